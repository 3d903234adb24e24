"""Images in memory that all reading processes share: resized pixels, or the files' bytes."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from reid.data.images import read_encoded
from reid.data.resize import Pixels

_SHARED_MEMORY = Path("/dev/shm")
_ASKING = 16  # threads; a slow disk answers many at once


class Read(Protocol):
    """Reads an image as resized pixels (H, W, 3), from its bytes if they are at hand."""

    def __call__(self, path: str, data: bytearray | None = None) -> Pixels:
        """The pixels of the file `path`, whose bytes are `data`."""


class ImageCache(Protocol):
    """Keeps images in memory, each from its first reading on.

    Attributes:
        num_bytes: The size of the full cache.
        available: Bytes that were free when it was made.
    """

    num_bytes: int
    available: int

    def pixels(self, index: int, path: str, read: Read) -> Pixels:
        """The resized pixels (H, W, 3) of an image, which must not be written to.

        Args:
            index: Its row among the images.
            path: Its file.
            read: Reads an image in its size; the same one in every call.

        Raises:
            DataError: The image cannot be read.
        """


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
        what = f"{count:,} images of {size[0]}x{size[1]}"
        self.available = _check_room(what, self.num_bytes * copies, num_workers > 0)
        self._pixels = _memory((count, *size, 3), num_workers > 0)
        self._known = _memory((count,), num_workers > 0).zero_()

    def pixels(self, index: int, path: str, read: Read) -> Pixels:
        """See `ImageCache`."""
        known = self.get(index)
        if known is not None:
            return known
        pixels = read(path)
        self.put(index, pixels)
        return pixels

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


class FileCache:
    """The bytes of image files, for disks that answer slowly; each file is read once.

    JPEG files take 5 to 20 times less memory than their pixels, but are decoded each time. A file
    whose length has changed since the cache was made is read from the disk each time.

    Args:
        paths: The files; those that cannot be asked for their length take no room.
        num_workers: Reading processes; with 0 the memory is not shared.
        copies: Caches of this size on this machine; other training processes have their own.

    Attributes:
        num_bytes: The size of the full cache.
        available: Bytes that were free when it was made.

    Raises:
        ValueError: There is too little memory.
    """

    def __init__(self, paths: Sequence[str], *, num_workers: int = 0, copies: int = 1) -> None:
        with ThreadPoolExecutor(_ASKING) as pool:
            lengths = torch.tensor([*pool.map(_length, paths)], dtype=torch.int64)
        self._ends = lengths.cumsum(0).tolist()
        self._lengths = lengths.tolist()
        self.num_bytes = int(lengths.sum()) + len(paths)
        what = f"the files of {len(paths):,} images"
        self.available = _check_room(what, self.num_bytes * copies, num_workers > 0)
        self._bytes = _memory((int(lengths.sum()),), num_workers > 0)
        self._known = _memory((len(paths),), num_workers > 0).zero_()

    def pixels(self, index: int, path: str, read: Read) -> Pixels:
        """See `ImageCache`."""
        length, end = self._lengths[index], self._ends[index]
        place = self._bytes[end - length : end]
        if self._known[index]:
            return read(path, bytearray(place.numpy()))
        data = read_encoded(path)
        if len(data) == length > 0:
            place.copy_(torch.frombuffer(data, dtype=torch.uint8))
            self._known[index] = 1  # last: other processes then use the bytes
        return read(path, data)


def _length(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  (a Path takes twice the time)
    except OSError:
        return 0  # reading it tells what is wrong


def _memory(shape: tuple[int, ...], shared: bool) -> Tensor:
    memory = torch.empty(shape, dtype=torch.uint8)
    return memory.share_memory_() if shared else memory  # type: ignore[no-untyped-call]


def _check_room(what: str, needed: int, shared: bool) -> int:
    """The bytes that are available.

    Raises:
        ValueError: They are too few.
    """
    available = available_bytes(shared=shared)
    if needed > available:
        raise ValueError(
            f"{what} need {size_text(needed)} of memory, {size_text(available)} are available"
            + f" (on {_SHARED_MEMORY} too, by which processes share it)" * shared
        )
    return available


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
