"""From the config to objects; the only reader of `Config`."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

import reid.clustering
import reid.data.augmentation
import reid.engine.cluster_files
import reid.evaluation.evaluators
import reid.modeling.backbones
import reid.modeling.heads
import reid.modeling.losses
import reid.modeling.memory_losses
import reid.modeling.osnet
import reid.modeling.vit  # noqa: F401  (importing the parts registers them)
from reid import distributed
from reid.config import Config, InputConfig
from reid.data.cache import PixelCache, size_text
from reid.data.datasets.joining import unique_names
from reid.data.loaders import OnError, eval_loader, train_loader
from reid.data.resize import Interpolation
from reid.data.samplers import LabelledSampler
from reid.data.transforms import ImageTransform
from reid.engine.checkpoints import SaveCheckpoints
from reid.engine.datasets import TrainImages, build_datasets, build_test_datasets
from reid.engine.hooks import Evaluate, LogMetrics, WarmUp
from reid.engine.logs import MetricWriter
from reid.engine.networks import as_model_knows, build_model, load_model_weights, place_model
from reid.engine.nonfinite import NonFiniteLosses, OnNonFinite
from reid.engine.provenance import provenance
from reid.engine.pseudo_labels import DrawClusters, OnCollapse, RefreshPseudoLabels
from reid.engine.splits import count_splits, log_dataset
from reid.engine.stopping import StopSignals
from reid.engine.testing import TestSet
from reid.engine.trainer import Amp, Hook, Trainer
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.extract import Precision
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.losses import Criterion
from reid.registry import (
    CLUSTERER,
    EVALUATOR,
    HOOK,
    LOSS,
    SAMPLER,
    TRANSFORM,
    ConfigError,
    build,
)
from reid.solver import build_optimizer, build_scheduler

logger = logging.getLogger(__name__)


def import_plugins(names: Sequence[str]) -> None:
    """Imports packages, which registers their parts.

    Raises:
        ConfigError: A package is not installed.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise
            raise ConfigError(
                f"plugins: there is no package {name!r}; install it, or put its folder on "
                "PYTHONPATH"
            ) from error


def build_criterion(
    specs: Sequence[Any], *, embed_dim: int, num_parts: int, num_classes: int
) -> Criterion:
    """The losses of the list, each with its `weight` (1 if not given).

    Raises:
        ConfigError: The list is empty, or an entry is wrong.
    """
    if not specs:
        raise ConfigError("criterion: expected a list of losses, it is empty")
    losses, weights = [], []
    for number, spec in enumerate(specs):
        where = f"criterion[{number}]"
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
            raise ConfigError(f"{where}.weight: expected a number from 0, got {weight!r}")
        losses.append(
            build(
                LOSS,
                options,
                where,
                embed_dim=embed_dim,
                num_parts=num_parts,
                num_classes=num_classes,
            )
        )
        weights.append(float(weight))
    return Criterion(losses, weights)


def build_train_images(config: Config) -> TrainImages:
    """The training set, or several joined; nothing is read yet.

    Raises:
        ConfigError: None is named, a dataset is unknown or an option is wrong.
    """
    return TrainImages(build_datasets(config.datasets.train, "datasets.train"))


def build_test_sets(config: Config, train: TrainImages | None = None) -> list[TestSet]:
    """The test sets of `datasets.test`, or else query and gallery of the training sets, if any.

    The model sees a camera under the number that it had in training; evaluation keeps the
    dataset's own.

    Args:
        config: Names the datasets.
        train: The training images, where they are built already.

    Raises:
        ConfigError: A dataset is unknown or an option is wrong.
        DataError: Its files are not what was expected.
    """
    if train is None and config.datasets.train:
        train = build_train_images(config)
    datasets = build_test_datasets(config.datasets.test, train)
    transform = build_transform(config.input, training=False)
    sets = []
    names = unique_names([dataset.name for dataset in datasets])
    for name, dataset in zip(names, datasets, strict=True):
        query, gallery = dataset.load("query"), dataset.load("gallery")
        loader = eval_loader(
            as_model_knows(config, train, [*query, *gallery], dataset),
            transform,
            batch_size=config.test.batch_size,
            num_workers=_num_workers(config),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        sets.append(
            TestSet(
                name,
                query,
                gallery,
                loader,
                config.test.flip,
                dataset.version,
                cast(Precision, config.test.precision),
                dataset.is_validation,
            )
        )
    return sets


def build_transform(config: InputConfig, *, training: bool) -> ImageTransform:
    """From pictures to the model's input; with augmentation in training.

    Raises:
        ConfigError: A transform is unknown, an option is wrong, or the order is.
    """
    steps = [
        build(TRANSFORM, spec, f"input.transforms[{i}]", mean=tuple(config.pixel_mean))
        for i, spec in enumerate(config.transforms if training else ())
    ]
    interpolation = config.interpolation if training else config.test_interpolation
    try:
        return ImageTransform(
            _image_size(config),
            config.pixel_mean,
            config.pixel_std,
            steps,
            interpolation=cast(Interpolation, interpolation),
        )
    except ValueError as error:
        raise ConfigError(f"input.{error}") from error


def build_cache(config: Config, count: int) -> PixelCache | None:
    """Memory for the training images, if `dataloader.cache` says so; logs its size.

    Raises:
        ConfigError: There is too little memory.
    """
    if config.dataloader.cache == "off":
        return None
    size, processes = _image_size(config.input), distributed.local_world_size()
    try:
        cache = PixelCache(count, size, num_workers=_num_workers(config), copies=processes)
    except ValueError as error:
        raise ConfigError(f"dataloader.cache: {error}; 'off' needs none") from error
    logger.info(
        "Cache: %s images of %dx%d take %s of memory%s as they are read; %s are available",
        f"{count:,}",
        *size,
        size_text(cache.num_bytes),
        f" in each of {processes} training processes" if processes > 1 else "",
        size_text(cache.available),
    )
    return cache


def build_evaluator(config: Config) -> Evaluator:
    """The evaluator of `test.evaluator`.

    Raises:
        ConfigError: It is unknown or an option is wrong.
    """
    return cast(Evaluator, build(EVALUATOR, config.test.evaluator, "test.evaluator"))


def build_trainer(
    config: Config, device: torch.device, writer: MetricWriter, signals: StopSignals
) -> Trainer:
    """Everything that a training run needs, put together.

    Raises:
        ConfigError: A part is unknown, an option is wrong, or parts do not fit each other.
        DataError: The images are not what was expected.
        WeightsError: The weights do not fit.
    """
    output_dir = Path(config.output_dir)
    images = build_train_images(config)
    records = images.load()
    test_sets = build_test_sets(config, images)
    splits = count_splits(images.name, records, test_sets, images.version)
    log_dataset(splits)
    identities = {record.pid for record in records if record.pid >= 0}
    if config.clusterer is None and not identities:
        raise ConfigError(
            "clusterer: null takes the identities as labels, but no training image of "
            f"{images.name} has one; set a clusterer, e.g. JaccardDBSCAN"
        )
    cameras = {record.camid for record in records}
    num_cameras = images.count_cameras()

    size = _image_size(config.input)
    model = build_model(config, size, num_cameras, sorted({*range(num_cameras)} - cameras))
    if config.model.weights:
        load_model_weights(model, config)
    if distributed.is_distributed() or config.model.bn_samples_per_group:
        group_batch_norms(model, config.model.bn_samples_per_group)
    place_model(model, config, device)
    criterion = build_criterion(
        config.criterion,
        embed_dim=model.embed_dim,
        num_parts=model.num_parts,
        num_classes=len(identities) if config.clusterer is None else 0,
    ).to(device)

    sampler: LabelledSampler = build(
        SAMPLER,
        config.dataloader.sampler,
        "dataloader.sampler",
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    group_size = config.model.bn_samples_per_group
    if group_size and sampler.batch_size % group_size:
        raise ConfigError(
            "model.bn_samples_per_group: expected 0 or a divisor of the batch of "
            f"{sampler.batch_size} samples, got {group_size}"
        )
    cache = build_cache(config, len(records))
    loader = train_loader(
        records,
        build_transform(config.input, training=True),
        sampler,
        cache=cache,
        on_error=cast(OnError, config.dataloader.on_error),
        num_workers=_num_workers(config),
        pin_memory=device.type == "cuda",
    )
    same_resize = config.input.interpolation == config.input.test_interpolation
    extraction = eval_loader(
        records,
        build_transform(config.input, training=False),
        batch_size=config.test.batch_size,
        cache=cache if same_resize else None,
        on_error=cast(OnError, config.dataloader.on_error),
        num_workers=_num_workers(config),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    clusterer = build(CLUSTERER, config.clusterer, "clusterer") if config.clusterer else None

    labels = RefreshPseudoLabels(
        clusterer,
        extraction,
        records,
        sampler,
        criterion,
        writer,
        cast(OnCollapse, config.on_collapse),
        allow_missing=config.dataloader.on_error == "skip",
        precision=cast(Precision, config.test.precision),
    )
    hooks: list[Hook] = [
        SaveCheckpoints(output_dir, config.checkpoint_period, config.checkpoint_keep),
        labels,
        LogMetrics(writer, config.log_period),
    ]
    if test_sets:
        hooks.append(
            Evaluate(
                test_sets,
                build_evaluator(config),
                writer,
                output_dir,
                provenance(config, device, splits),
                period=config.test.eval_period,
                at_start=config.test.eval_at_start,
                best_metric=config.test.best_metric,
                ranked_lists=config.test.ranked_lists,
            )
        )
    else:
        logger.warning("%s has no query and gallery: nothing will be evaluated", images.name)
    if clusterer is not None and config.test.ranked_lists:
        hooks.append(DrawClusters(labels, records, output_dir, writer, config.test.ranked_lists))
    hooks.extend(
        build(
            HOOK,
            spec,
            f"hooks[{i}]",
            output_dir=output_dir,
            records=records,
            extraction=extraction,
            clusterer=clusterer,
            writer=writer,
            allow_missing=config.dataloader.on_error == "skip",
            precision=config.test.precision,
        )
        for i, spec in enumerate(config.hooks)
    )
    solver = config.solver
    if solver.warmup_iterations:
        hooks.append(WarmUp(solver.warmup_iterations, solver.warmup_factor))

    optimizer = build_optimizer(
        [*model.named_parameters(), *criterion.named_parameters()],
        cast(Any, solver.optimizer),
        lr=solver.base_lr,
        momentum=solver.momentum,
        weight_decay=solver.weight_decay,
        bias_lr_factor=solver.bias_lr_factor,
    )
    scheduler = build_scheduler(
        optimizer,
        cast(Any, solver.schedule),
        max_epochs=solver.max_epochs,
        milestones=solver.milestones,
        gamma=solver.gamma,
        final_lr_factor=solver.final_lr_factor,
        cosine_after_warmup=solver.cosine_after_warmup,
        warmup_epochs=solver.warmup_epochs,
        warmup_start=solver.warmup_factor,
    )
    return Trainer(
        model,
        criterion,
        optimizer,
        scheduler,
        loader,
        max_epochs=solver.max_epochs,
        device=device,
        amp=cast(Amp, solver.amp),
        accumulation_steps=solver.accumulation_steps,
        clip_grad_norm=solver.clip_grad_norm,
        hooks=hooks,
        signals=signals,
        nonfinite=NonFiniteLosses(
            cast(OnNonFinite, solver.on_nonfinite),
            solver.max_skipped,
            [record.path for record in records],
            output_dir,
        ),
    )


def _num_workers(config: Config) -> int:
    """No more than there are CPUs; the images are the same for any number."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(config.dataloader.num_workers, available or 1)


def _image_size(config: InputConfig) -> tuple[int, int]:
    return config.size[0], config.size[1]
