"""Builds a training run from a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from reid.assembly import parts  # noqa: F401  (registers the core's parts)
from reid.assembly.cameras import training_cameras
from reid.assembly.data import TrainImages, hide_target_identities
from reid.assembly.hooks import build_hooks
from reid.assembly.images import (
    build_test_sets,
    build_train_images,
    image_size,
)
from reid.assembly.network import build_more_students, build_training_model, camera_counter
from reid.assembly.provenance import provenance
from reid.assembly.splits import count_splits, log_dataset
from reid.assembly.stages import StageBuilder, build_labellers
from reid.assembly.trained import describe_course, describe_training
from reid.config import Config
from reid.engine.metrics import MetricWriter
from reid.engine.nonfinite import NonFiniteLosses
from reid.engine.stopping import StopSignals
from reid.engine.trainer import RunFacts, Trainer
from reid.registry import ConfigError
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
    splits = []
    for name, version, part in images.domains():
        splits += count_splits(name, part, [], version)
    splits += count_splits("", [], test_sets)
    log_dataset(splits)
    hidden = hide_target_identities(records, images.source_domains)
    identities = len({record.pid for record in hidden if record.pid >= 0})
    labellers = build_labellers(config, hidden, images.name)
    model = build_training_model(config, image_size(config.input), images, device)
    more_students = build_more_students(config, image_size(config.input), images, device)
    stages = StageBuilder(config, labellers, records, model, device, more_students)
    hooks = build_hooks(
        config,
        stages.label_hooks(writer),
        labellers[-1],
        stages.images,
        test_sets,
        provenance(config, device, splits),
        writer,
        stages.source_end(),
    )
    return Trainer(
        model,
        stages.first.criterion,
        stages.first.optimization,
        stages.first.loader,
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
        stages=stages.stages,
        more_students=more_students,
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
