#!/usr/bin/env python
"""Times reading, resizing and augmenting JPEG files against the field's pipeline, on one core.

Floor: decoding the very same files from memory, and resizing their pixels, each alone.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floors import Floor, Parts, same_threads
from measure import report
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg

from reid.data.augmentation import PadCrop, RandomErasing, RandomFlip
from reid.data.cache import PixelCache, size_text
from reid.data.images import Decoding, read_image
from reid.data.loaders import train_loader
from reid.data.resize import resize
from reid.data.samplers import PKSampler
from reid.data.synthetic import draw_image, synthesise_camera, synthesise_person
from reid.data.transforms import ImageTransform
from reid.structures import ImageRecord, PseudoLabels

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOURCES = {
    # source: (H, W) of the input
    "market": (256, 128),
    "msmt": (384, 128),
    "large": (256, 128),
}
QUALITY = 92


def draw(source: str, number: int, folder: str) -> str:
    """Draws a synthesised person into a JPEG file.

    Its size is 128x64 for `market`; for `msmt` around 300x120, like boxes of a detector; for
    `large` around 1,200x480, like boxes of a 4K camera.
    """
    rng = np.random.default_rng((7, number))
    camera = synthesise_camera(np.random.default_rng((8, number % 4)))
    height, width = (128, 64) if source == "market" else (300, 120)
    enlarged = 4.0 if source == "large" else 1.0
    picture = Image.fromarray(draw_image(synthesise_person(rng), camera, rng, height, width))
    if source != "market":
        scale, stretch = enlarged * math.exp(rng.normal(0, 0.3)), math.exp(rng.normal(0, 0.1))
        picture = picture.resize((round(width * scale * stretch), round(height * scale)))
    path = Path(folder) / f"{number:05d}.jpg"
    picture.save(path, quality=QUALITY)
    return str(path)


class FieldDataset(Dataset[Any]):
    """The field's pipeline: Pillow opens, converts, resizes, flips, pads and crops each image."""

    def __init__(self, records: list[ImageRecord], size: tuple[int, int]) -> None:
        self._records = records
        self._transform = transforms.Compose(
            [
                transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.Pad(10),
                transforms.RandomCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(mean=MEAN, std=STD),
                FieldErasing(),
            ]
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int, int]:
        record = self._records[index]
        image = Image.open(record.path).convert("RGB")
        return self._transform(image), record.pid, record.camid, index


class FieldErasing:
    """Random erasing as the field writes it, which fills with the numbers of the mean."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Changes the image in place and returns it."""
        if random.uniform(0, 1) >= 0.5:
            return image
        _, height, width = image.shape
        for _ in range(100):
            area = random.uniform(0.02, 0.4) * height * width
            aspect = random.uniform(0.3, 1 / 0.3)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                for channel in range(3):
                    image[channel, top : top + h, left : left + w] = MEAN[channel]
                return image
        return image


def field_loader(records: list[ImageRecord], size: tuple[int, int]) -> Iterable[Any]:
    """The baseline."""
    return DataLoader(FieldDataset(records, size), BATCH, shuffle=True, drop_last=True)


def our_loader(
    records: list[ImageRecord],
    size: tuple[int, int],
    cache: PixelCache | None,
    decoding: Decoding = "exact",
) -> Iterable[Any]:
    """This project's loader, with a sampler that samples every image about once."""
    sampler = PKSampler(BATCH, images_per_identity=1, seed=1)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(len(records))))
    steps = [RandomFlip(0.5), PadCrop(10), RandomErasing(0.5, mean=MEAN)]
    transform = ImageTransform(size, MEAN, STD, steps, decoding=decoding)
    return train_loader(records, transform, sampler, cache=cache)


def same_pixels(records: list[ImageRecord], size: tuple[int, int]) -> bool:
    """Whether both sides read and resize the first files alike, to one grey level."""
    ours = ImageTransform(size, MEAN, STD)
    for record in records[:200]:
        theirs = Image.open(record.path).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
        found = ours.resize(read_image(record.path))
        if np.abs(found.astype(int) - np.asarray(theirs).astype(int)).max() > 1:
            return False
    return True


def least(files: list[torch.Tensor], size: tuple[int, int]) -> Parts:
    """Seconds an image of decoding and of resizing these files."""
    start = time.process_time()
    pictures = [
        decode_jpeg(data, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy() for data in files
    ]
    between = time.process_time()
    # To resize, pixels must lie row by row; a loader need not pay for the change.
    pictures = [np.ascontiguousarray(pixels) for pixels in pictures]
    before = time.process_time()
    for pixels in pictures:
        resize(pixels, size, "bicubic")
    end = time.process_time()
    return {"decoding": (between - start) / len(files), "resizing": (end - before) / len(files)}


def endless(make: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Yields batches pass after pass."""
    loader = make()
    while True:
        yield from loader


def main() -> None:
    """Parses the arguments, draws the files, times batches of both sides in turn, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", choices=[*SOURCES], default="market")
    parser.add_argument("--images", type=int, default=1024, help="files (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="passes that count (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    same_threads()
    size = SOURCES[arguments.source]
    count = arguments.images
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor() as pool:
            paths = list(pool.map(draw, [arguments.source] * count, range(count),
                                  [folder] * count, chunksize=16))  # fmt: skip
        kilobytes = sum(Path(path).stat().st_size for path in paths) / count / 1000
        records = [ImageRecord(path, 0, 0) for path in paths]
        cache = PixelCache(count, size)
        sides: dict[str, Callable[[], Iterable[Any]]] = {
            "baseline": lambda: field_loader(records, size),
            "ours": lambda: our_loader(records, size, None),
            "cached": lambda: our_loader(records, size, cache),
            "reduced": lambda: our_loader(records, size, None, "reduced"),
        }
        files = [
            torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
            for path in paths
        ]
        floors: list[Parts] = []
        running = {name: endless(make) for name, make in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        batches = count // BATCH
        for number in range(batches * (arguments.rounds + 1)):
            for name, loader in running.items():
                start = time.process_time()
                next(loader)
                if number >= batches:  # the first pass warms up and fills the cache
                    times[name].append((time.process_time() - start) / BATCH)
            if number >= batches:
                first = number % batches * BATCH
                floors.append(least(files[first : first + BATCH], size))
        agrees = same_pixels(records, size)
    typical = {name: statistics.median(values) for name, values in times.items()}
    parts = {name: statistics.median(each[name] for each in floors) for name in floors[0]}
    floor = Floor(parts, typical["ours"])
    ratio = {
        name: statistics.median(
            slow / fast for slow, fast in zip(times["baseline"], times[name], strict=True)
        )
        for name in ("ours", "cached", "reduced")
    }
    sys.stdout.write(
        f"CPU time of one process, median of {len(times['ours']):,} batches: baseline "
        f"{1e6 * typical['baseline']:.0f} us an image, this project {1e6 * typical['ours']:.0f}, "
        f"with the cache ({size_text(cache.num_bytes)}) {1e6 * typical['cached']:.0f} "
        f"({ratio['cached']:.1f}x), with reduced decoding {1e6 * typical['reduced']:.0f} "
        f"({ratio['reduced']:.1f}x)\n"
    )
    report(
        "loading", f"{arguments.source} ({count:,} files of {kilobytes:.1f} kB to "
        f"{size[0]}x{size[1]}, batches of {BATCH})",
        (count * typical["ours"], None), (count * typical["baseline"], None), agrees, floor,
        cached_seconds=round(count * typical["cached"], 3),
        paired_ratio=round(ratio["ours"], 2), paired_cached_ratio=round(ratio["cached"], 2),
        paired_reduced_ratio=round(ratio["reduced"], 2),
        cache_bytes=cache.num_bytes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
