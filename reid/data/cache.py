"""Decoded pixels in memory."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch

from reid.data.resize import Pixels

_SHARED_MEMORY = Path("/dev/shm")


class PixelCache:
    """Resized images in memory that all reading processes share; each is stored when first read.

    Args:
        count: Images.
        size: (H, W) of each.
        num_workers: Reading processes; with 0 the memory is not shared.
        copies: Caches of this size on this machine; other training processes have their own.

    Attributes:
        num_bytes: The size of the full cache.
        available: Bytes that were free when it was made.

    Raises:
        ValueError: There is too little memory.
    """

    def __init__(
        self, count: int, size: tuple[int, int], *, num_workers: int = 0, copies: int = 1
    ) -> None:
        self.num_bytes = cache_bytes(count, size)
        self.available = available_bytes(shared=num_workers > 0)
        if self.num_bytes * copies > self.available:
            raise ValueError(
                f"{count:,} images of {size[0]}x{size[1]} need "
                f"{size_text(self.num_bytes * copies)} of memory, "
                f"{size_text(self.available)} are available"
                + (f" (on {_SHARED_MEMORY} too, by which processes share it)" * (num_workers > 0))
            )
        self._pixels = torch.empty((count, *size, 3), dtype=torch.uint8)
        self._known = torch.zeros(count, dtype=torch.uint8)
        if num_workers:
            self._pixels.share_memory_()  # type: ignore[no-untyped-call]
            self._known.share_memory_()  # type: ignore[no-untyped-call]

    def get(self, index: int) -> Pixels | None:
        """The pixels (H, W, 3) of an image, which must not be written to; None: not stored yet."""
        if not self._known[index]:
            return None
        pixels: Pixels = self._pixels[index].numpy()
        return pixels

    def put(self, index: int, pixels: Pixels) -> None:
        """Stores the pixels (H, W, 3) of an image."""
        self._pixels[index] = torch.from_numpy(pixels)
        self._known[index] = 1  # last: other processes then read the pixels


def cache_bytes(count: int, size: tuple[int, int]) -> int:
    """The size of a full `PixelCache` in bytes."""
    return count * math.prod(size) * 3 + count


def available_bytes(*, shared: bool) -> int:
    """Free memory of this machine in bytes.

    Args:
        shared: Count only memory that processes can share, which containers often limit.
    """
    free = _available_memory()
    if shared and _SHARED_MEMORY.is_dir():
        free = min(free, shutil.disk_usage(_SHARED_MEMORY).free)
    return free


def size_text(num_bytes: int) -> str:
    """A size as the log states it: `3.21 GB`, `25 MB`."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _available_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
