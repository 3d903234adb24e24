"""Builds transforms, caches, training sets and test sets."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reid import distributed
from reid.assembly.cameras import Camera, renumber_cameras
from reid.assembly.data import (
    TrainImages,
    build_datasets,
    build_source_tests,
    build_test_datasets,
)
from reid.assembly.hooks import build_evaluator
from reid.config import Config, InputConfig
from reid.data.cache import FileCache, ImageCache, PixelCache, size_text
from reid.data.datasets.joining import unique_names
from reid.data.images import Decoding
from reid.data.loaders import BatchLoader, eval_loader, side_columns, train_loader
from reid.data.maps import ImageMap, map_size
from reid.data.samplers import LabelledSampler
from reid.data.transforms import ImageTransform
from reid.evaluation.extract import ImageSet
from reid.evaluation.query_gallery import QueryGallery, usable_test_sets
from reid.registry import MAP, TRANSFORM, ConfigError, build
from reid.structures import Batch, ImageRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """The training images, in two forms.

    Attributes:
        images: All images once, prepared as in tests, for extracting features.
        loader: Augmented batches of the images that the sampler chooses.
        cache: Of the images for training, if the config asks for it.
        eval_cache: The same one, if it serves extraction: it holds files, or pixels that are
            resized alike.
    """

    images: ImageSet
    loader: BatchLoader
    cache: ImageCache | None = None
    eval_cache: ImageCache | None = None


def build_train_images(config: Config) -> TrainImages:
    """The training set or several joined ones, after the sources; reads nothing yet.

    Raises:
        ConfigError: No dataset is named, one is unknown, or an option is wrong.
    """
    sets = config.datasets
    sources = [] if sets.source is None else build_datasets(sets.source, "datasets.source")
    return TrainImages(build_datasets(sets.train, "datasets.train"), sources)


def build_training_set(
    config: Config,
    records: Sequence[ImageRecord],
    sampler: LabelledSampler,
    device: torch.device,
    views: int = 1,
) -> TrainingSet:
    """The training images with their loaders.

    Args:
        config: The run's config.
        records: The images.
        sampler: Chooses the images of each batch.
        device: The device that trains.
        views: How many augmented versions of each image a batch has, each with its transforms.

    Raises:
        ConfigError: A setting is wrong, or memory is too small for the cache.
        DataError: Some images have a number in their `extra` that others lack.
    """
    cache = build_cache(config, records)
    loader = build_train_loader(config, records, sampler, device, views, cache)
    same_resize = config.input.interpolation == config.input.test_interpolation
    eval_cache = cache if same_resize or config.dataloader.cache == "files" else None
    images = build_image_set(config, "training images", records, eval_cache)
    return TrainingSet(images, loader, cache, eval_cache)


def build_train_loader(
    config: Config,
    records: Sequence[ImageRecord],
    sampler: LabelledSampler,
    device: torch.device,
    views: int,
    cache: ImageCache | None,
) -> BatchLoader:
    """Augmented batches; see `build_training_set`.

    Raises:
        ConfigError: A setting is wrong.
        DataError: Some images have a number in their `extra` that others lack, or lack a map.
    """
    if views > 1 and config.input.maps:
        raise ConfigError(
            f"input.maps: are read for one view of each image, but a loss needs {views} views"
        )
    return train_loader(
        records,
        build_transform(config.input, training=True, decoding=config.input.decoding),
        sampler,
        cache=cache,
        on_error=config.dataloader.on_error,
        num_workers=_num_workers(config),
        pin_memory=device.type == "cuda",
        views=[build_transform(config.input, training=True, view=v) for v in range(1, views)],
    )


def build_image_set(
    config: Config,
    name: str,
    records: Sequence[ImageRecord],
    cache: ImageCache | None = None,
    rows: Sequence[int] | None = None,
) -> ImageSet:
    """Training images, prepared as in tests.

    Args:
        config: The run's config.
        name: For messages.
        records: The images.
        cache: Of the images as they are resized.
        rows: The images whose features are wanted; None: all.

    Raises:
        ConfigError: A setting is wrong.
    """
    loader = eval_loader(
        records,
        build_transform(config.input, training=False, decoding=config.input.decoding),
        batch_size=config.test.batch_size,
        cache=cache,
        on_error=config.dataloader.on_error,
        num_workers=_num_workers(config),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        rows=rows,
    )
    return ImageSet(
        name,
        records,
        loader,
        allow_missing=config.dataloader.on_error == "skip",
        precision=config.test.precision,
        rows=rows,
    )


def build_test_sets(
    config: Config,
    train: TrainImages | None = None,
    cameras: Sequence[Camera] | None = None,
    *,
    check: bool = True,
) -> list[QueryGallery]:
    """The test sets of `datasets.test`; if empty, query and gallery of the training sets.

    With `test.source`, those of the sources follow.

    The model gets a camera's number from training; evaluation uses the number in the dataset.

    Args:
        config: Names the datasets.
        train: The training images, if they are built already.
        cameras: The model's cameras; None: it has none, or camera numbers stay as they are.
        check: Leave out test sets that the evaluator cannot score, with a warning; see
            `Evaluator.needs_match`.

    Raises:
        ConfigError: A dataset is unknown or an option is wrong.
        DataError: A dataset's files are not what was expected, or no test set can be scored.
    """
    if train is None and config.datasets.train:
        train = build_train_images(config)
    targets = build_test_datasets(config.datasets.test, train)
    sources = build_source_tests(train) if config.test.source and train is not None else []
    datasets = [*targets, *sources]
    transform = build_transform(config.input, training=False)
    sets = []
    evaluator = build_evaluator(config)
    names = unique_names([dataset.name for dataset in datasets])
    for number, (name, dataset) in enumerate(zip(names, datasets, strict=True)):
        query, gallery = dataset.load("query"), dataset.load("gallery")
        loader = eval_loader(
            renumber_cameras(cameras, [*query, *gallery], dataset),
            transform,
            batch_size=config.test.batch_size,
            num_workers=_num_workers(config),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        images = ImageSet(
            name,
            [*query, *gallery],
            loader,
            flip=config.test.flip,
            precision=config.test.precision,
            raw="all" if evaluator.needs_raw else "none",
        )
        facts = dataset.version, dataset.is_validation, number >= len(targets)
        sets.append(QueryGallery(name, query, gallery, images, *facts))
    if not check or not evaluator.needs_match:
        return sets
    return usable_test_sets(sets)


def build_transform(
    config: InputConfig, *, training: bool, view: int = 0, decoding: Decoding = "exact"
) -> ImageTransform:
    """Turns pictures into the model's input; in training, with augmentation.

    Args:
        config: Names the transforms.
        training: With augmentation.
        view: The view whose augmentation it is.
        decoding: How image files are decoded.

    Raises:
        ConfigError: A transform is unknown, an option is wrong, or the order is wrong.
    """
    key, specs = "transforms", config.transforms
    if 0 < view <= len(config.views) and config.views[view - 1] is not None:
        key, specs = f"views[{view - 1}]", config.views[view - 1]
    steps = [
        build(TRANSFORM, spec, f"input.{key}[{i}]", mean=tuple(config.pixel_mean))
        for i, spec in enumerate(specs if training else ())
    ]
    maps = _build_maps(config)
    interpolation = config.interpolation if training else config.test_interpolation
    try:
        return ImageTransform(
            image_size(config),
            config.pixel_mean,
            config.pixel_std,
            steps,
            interpolation=interpolation,
            decoding=decoding,
            maps=maps,
        )
    except ValueError as error:
        raise ConfigError(f"input.{key}{str(error).removeprefix('transforms')}") from error


def _build_maps(config: InputConfig) -> list[ImageMap]:
    maps: list[ImageMap] = [
        build(MAP, spec, f"input.maps[{i}]") for i, spec in enumerate(config.maps)
    ]
    names = [source.side for source in maps]
    if len(set(names)) < len(names):
        kinds = ", ".join(f"{type(m).__name__} is {m.side}" for m in maps)
        raise ConfigError(f"input.maps: expected maps of different names, got {kinds}")
    return maps


def blank_batch(config: Config, records: Sequence[ImageRecord]) -> Batch:
    """A batch of one black image of the input's size, with all that batches of the records have.

    Args:
        config: Its `input` says the size, and which maps are read beside the images.
        records: Images of the data set.
    """
    size = image_size(config.input)
    maps = _build_maps(config.input)
    side = side_columns(records[:1]) | {
        m.side: torch.zeros(1, len(m.mirror), *map_size(size, m.stride)) for m in maps
    }
    batch = Batch.of(torch.zeros(1, 3, *size), torch.tensor([records[0].camid]))
    return batch._replace(side=side, maps={m.side: m.mirror for m in maps})


def build_cache(config: Config, records: Sequence[ImageRecord]) -> ImageCache | None:
    """A memory cache for the training images, if `dataloader.cache` asks for it; logs its size.

    Raises:
        ConfigError: The machine has too little memory.
    """
    kind, processes = config.dataloader.cache, distributed.local_world_size()
    if kind == "off":
        return None
    shares: dict[str, int] = {"num_workers": _num_workers(config), "copies": processes}
    height, width = image_size(config.input)
    cache: ImageCache
    try:
        if kind == "files":
            cache = FileCache([record.path for record in records], **shares)
        else:
            cache = PixelCache(len(records), (height, width), **shares)
    except ValueError as error:
        smaller = "'files' needs less, 'off' none" if kind == "ram" else "'off' needs none"
        raise ConfigError(f"dataloader.cache: {error}; {smaller}") from error
    logger.info(
        "Cache: %s %s will take %s of memory%s as they are read; %s are available",
        f"{len(records):,}",
        "image files" if kind == "files" else f"images of {height}x{width}",
        size_text(cache.num_bytes),
        f" in each of {processes} training processes" if processes > 1 else "",
        size_text(cache.available),
    )
    return cache


def image_size(config: InputConfig) -> tuple[int, int]:
    """(H, W) in pixels."""
    return config.size[0], config.size[1]


def _num_workers(config: Config) -> int:
    """At most one worker for each CPU; the number of workers does not change the images."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(config.dataloader.num_workers, available or 1)
