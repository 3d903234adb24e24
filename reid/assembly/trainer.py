"""Builds a training run from a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from reid import distributed
from reid.assembly import parts  # noqa: F401  (registers the core's parts)
from reid.assembly.cameras import training_cameras
from reid.assembly.criterion import build_criterion
from reid.assembly.data import TrainImages
from reid.assembly.hooks import build_hooks
from reid.assembly.images import (
    build_test_sets,
    build_train_images,
    build_training_set,
    image_size,
)
from reid.assembly.labelling import build_labeller
from reid.assembly.network import build_training_model, camera_counter
from reid.assembly.optimization import build_optimization
from reid.assembly.provenance import provenance
from reid.assembly.splits import count_splits, log_dataset
from reid.assembly.trained import describe_course, describe_training
from reid.config import Config
from reid.data.samplers import LabelledSampler
from reid.engine.metrics import MetricWriter
from reid.engine.nonfinite import NonFiniteLosses
from reid.engine.stopping import StopSignals
from reid.engine.trainer import RunFacts, Trainer
from reid.registry import SAMPLER, ConfigError, build
from reid.structures import ImageRecord


def build_trainer(
    config: Config, device: torch.device, writer: MetricWriter, signals: StopSignals
) -> Trainer:
    """Builds everything that a training run needs.

    Raises:
        ConfigError: A part is unknown, an option is wrong, or parts do not fit each other.
        DataError: The images are not what was expected.
        WeightsError: The weights do not fit.
    """
    images = build_train_images(config)
    records = images.load()
    _check_output_dir(Path(config.output_dir), images, records)
    cameras = training_cameras(images) if camera_counter(config) is not None else None
    test_sets = build_test_sets(config, images, cameras)
    splits = count_splits(images.name, records, test_sets, images.version)
    log_dataset(splits)
    labeller = build_labeller(config, records, images.name)
    identities = len({record.pid for record in records if record.pid >= 0})
    model = build_training_model(config, image_size(config.input), images, device)
    criterion = build_criterion(
        config.criterion,
        embed_dim=model.embed_dim,
        num_parts=model.num_parts,
        num_classes=labeller.count_classes(records),
    ).to(device)
    sampler = build_sampler(config)
    views = 1 + max(view for _, view in criterion.asks_for)
    training = build_training_set(config, records, sampler, device, views)
    hooks = build_hooks(
        config,
        labeller,
        training.images,
        sampler,
        criterion,
        test_sets,
        provenance(config, device, splits),
        writer,
    )
    return Trainer(
        model,
        criterion,
        build_optimization(config, model, criterion, device),
        training.loader,
        max_epochs=config.solver.max_epochs,
        device=device,
        hooks=hooks,
        signals=signals,
        facts=RunFacts(
            describe_training(config, model, cameras or (), identities), describe_course(records)
        ),
        nonfinite=NonFiniteLosses(
            config.solver.on_nonfinite,
            config.solver.max_skipped,
            [record.path for record in records],
            Path(config.output_dir),
        ),
    )


def _check_output_dir(
    output_dir: Path, images: TrainImages, records: Sequence[ImageRecord]
) -> None:
    """Requires that the run's pictures do not become training images.

    Raises:
        ConfigError: The output folder lies in the images' folder, or in a folder that a link in
            the images' folder leads to.
    """
    used = {os.path.realpath(folder) for folder in {Path(record.path).parent for record in records}}
    for dataset in images.datasets:
        folder = dataset.scanned_folder
        if folder is None:
            continue
        links = [entry.path for entry in os.scandir(folder) if entry.is_symlink()]
        targets = {os.path.realpath(path) for path in (str(folder), *links)}
        for target in sorted(targets | used):
            if output_dir.resolve().is_relative_to(target):
                raise ConfigError(
                    f"output_dir: {str(output_dir)!r} lies in {target}, where {dataset.name} looks "
                    "for images, so the run's pictures would become training images; choose "
                    "another folder"
                )


def build_sampler(config: Config) -> LabelledSampler:
    """Builds the sampler, which chooses the images of this process's batches.

    Raises:
        ConfigError: The sampler is unknown, an option is wrong, or the batch cannot be divided into
            BatchNorm's groups.
    """
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
    return sampler
