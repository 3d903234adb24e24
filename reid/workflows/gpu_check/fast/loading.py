"""Images from JPEG files: the loader alone, before extraction, before training steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from reid.data.augmentation import PadCrop, RandomErasing, RandomFlip
from reid.data.cache import PixelCache
from reid.data.loaders import eval_loader, train_loader
from reid.data.samplers import ProxyBalancedSampler
from reid.data.transforms import ImageTransform
from reid.structures import ImageRecord, PseudoLabels
from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory, synchronize

_MEAN, _STD = (0.3525, 0.3106, 0.3140), (0.2660, 0.2522, 0.2505)
_QUALITY = 92
_MOST_WORKERS = 16
_REPEATED = 8
_STEPS = 40
_TITLE = "JPEG files of a detector's sizes"


def run(context: Context) -> None:
    """Writes files, then times the loader alone and together with extraction and training."""
    parts.import_parts()
    sizes, found = context.sizes, context.found
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = 0 if context.device.type == "cpu" else min(cores or 1, _MOST_WORKERS)
    records = _write_files(Path(context.folder), sizes.files, sizes.image)
    kilobytes = sum(Path(record.path).stat().st_size for record in records) / len(records) / 1e3
    found.note(
        f"{workers} reading processes; {len(records):,} files of {kilobytes:.1f} kB, which the "
        f"system holds in memory. A pass over test images reads each {_REPEATED} times and holds "
        "the start of the processes, as every extraction does; those of training live on."
    )
    loader = _train_loader(context, records, workers, None)
    rate = _rate(_endless(loader), context)
    found.row(_TITLE, what="training images, read and augmented", images_per_s=rate)
    found.number("train_images_s", rate)
    if context.enough(3 * sizes.seconds, "steps with the loader"):
        _steps(context, loader)
    _test_images(context, records, workers)
    if context.enough(3 * sizes.seconds, "training images from the cache"):
        cache = PixelCache(len(records), sizes.image, num_workers=workers)
        for _ in _test_loader(context, records, workers, cache):
            pass  # fills the cache
        rate = _rate(_endless(_train_loader(context, records, workers, cache)), context)
        found.row(_TITLE, what="training images from the cache, augmented", images_per_s=rate)
        found.number("cached_images_s", rate)


def _test_images(context: Context, records: list[ImageRecord], workers: int) -> None:
    """A pass of the loader alone, and one with extraction."""
    sizes, found = context.sizes, context.found
    many = _REPEATED * records
    if not context.enough(3 * sizes.seconds, "test images"):
        return
    rate = _rate(iter(_test_loader(context, many, workers)), context, first=False)
    found.row(_TITLE, what="test images, read and resized", images_per_s=rate)
    found.number("test_images_s", rate)
    if not context.enough(2 * len(many) / rate, "extraction with the loader"):
        return
    network = parts.make_network(sizes, context.device)
    few = records[: sizes.test_batch]
    parts.extract(network, _test_loader(context, few, workers), few, context.device, "bf16")
    begun = time.perf_counter()
    loader = _test_loader(context, many, workers)
    parts.extract(network, loader, many, context.device, "bf16")
    rate = len(many) / (time.perf_counter() - begun)
    found.row(_TITLE, what="extraction in bf16 with TMGF, through the loader", images_per_s=rate)
    found.number("extraction_images_s", rate)


def _write_files(folder: Path, count: int, image: tuple[int, int]) -> list[ImageRecord]:
    """Writes files of smooth colours and noise, with sizes like a pedestrian detector's boxes."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        height, width = (max(8, round(s * rng.uniform(0.6, 0.95))) for s in image)
        coarse = rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((width, height)), dtype=np.int16)
        picture = (picture + rng.integers(-12, 13, picture.shape)).clip(0, 255).astype(np.uint8)
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(picture).save(path, quality=_QUALITY)
        records.append(ImageRecord(str(path), camid=number % parts.CAMERAS))
    return records


def _train_loader(
    context: Context, records: list[ImageRecord], workers: int, cache: PixelCache | None
) -> Any:
    """A loader with TMGF's augmentation and sampler; four images per proxy."""
    sampler = ProxyBalancedSampler(
        context.sizes.small_batch, images_per_proxy=4, steps_per_epoch=_STEPS, seed=1
    )
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(len(records)) // 4))
    steps: list[Any] = [RandomFlip(0.5), PadCrop(10), RandomErasing(0.5, mean=_MEAN)]
    return train_loader(
        records, ImageTransform(context.sizes.image, _MEAN, _STD, steps), sampler, cache=cache,
        num_workers=workers, pin_memory=context.device.type == "cuda",
    )  # fmt: skip


def _test_loader(
    context: Context,
    records: list[ImageRecord],
    workers: int,
    cache: PixelCache | None = None,
) -> Any:
    transform = ImageTransform(context.sizes.image, _MEAN, _STD)
    return eval_loader(
        records, transform, batch_size=context.sizes.test_batch, cache=cache, num_workers=workers
    )


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _rate(batches: Iterator[Any], context: Context, *, first: bool = True) -> float:
    """Measures images per second.

    Args:
        batches: Batches of images; a finite pass is measured to its end.
        context: Its clock ends an infinite pass.
        first: Whether to leave out the first batch, for which the processes start.
    """
    if first:
        next(batches)
    images, begun = 0, time.perf_counter()
    until = min(context.sizes.seconds if first else math.inf, context.clock.left() / 3)
    for batch in batches:
        images += len(batch.index)
        if time.perf_counter() - begun > until:
            break
    return images / (time.perf_counter() - begun)


def _steps(context: Context, loader: Any) -> None:
    """Times steps of TMGF in fp16 with the loader, and how long they wait for batches."""
    sizes, device = context.sizes, context.device
    free_memory(device)
    network = parts.make_network(sizes, device)
    labelled = parts.make_labelled(sizes.files, 1 + network.num_parts, sizes.dim, device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
    trainer = parts.make_trainer(network, criterion, device, amp="fp16")
    batches = iter(loader)
    for _ in range(3):
        trainer.run_step(next(batches).to(device))
    synchronize(device)
    waited, steps, begun = 0.0, 0, time.perf_counter()
    for steps in range(1, _STEPS - 3):  # noqa: B007 - counts
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        trainer.run_step(batch.to(device))
        if time.perf_counter() - begun > 2 * sizes.seconds or context.clock.left() < sizes.seconds:
            break
    synchronize(device)
    taken = time.perf_counter() - begun
    context.found.row(
        _TITLE, what=f"training steps of {sizes.small_batch} in fp16, through the loader",
        images_per_s=steps * sizes.small_batch / taken,
    )  # fmt: skip
    context.found.row(
        f"A step of {sizes.small_batch} images with the loader, fp16",
        ms=1e3 * taken / steps, of_which_waiting_for_the_loader_ms=1e3 * waited / steps,
    )  # fmt: skip
    context.found.number("step_ms", 1e3 * taken / steps)
    context.found.number("waiting_ms", 1e3 * waited / steps)
