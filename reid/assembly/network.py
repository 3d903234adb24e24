"""The network of a config, on its device, with its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reid import distributed
from reid.assembly.data import TrainImages
from reid.config import Config, InputConfig
from reid.data.datasets.base import ReIDDataset
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.compiling import compile_network
from reid.modeling.model import ReIDModel
from reid.modeling.weights import (
    WeightsError,
    load_backbone_weights,
    load_weights,
    read_checkpoint,
)
from reid.registry import BACKBONE, HEAD, ConfigError, build
from reid.structures import ImageRecord

logger = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of this process: with several, each takes the GPU of its local rank.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} was asked for, but torch sees no CUDA device")
    if name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    return torch.device(name)


def build_model(
    config: Config,
    image_size: tuple[int, int],
    num_cameras: int,
    unseen_cameras: Sequence[int] = (),
) -> ReIDModel:
    """The network with its pre-trained backbone; `model.weights` are not loaded yet.

    The backbone's weights come first, since a head may take over or copy layers of the backbone.
    Where there are `model.weights`, which hold the backbone too, its own are not read.

    Raises:
        ConfigError: A part is unknown or an option is wrong.
        WeightsError: The weights do not fit.
    """
    backbone = build(
        BACKBONE,
        config.model.backbone,
        "model.backbone",
        image_size=image_size,
        num_cameras=num_cameras,
        unseen_cameras=unseen_cameras,
    )
    if config.model.backbone_weights and not config.model.weights:
        path = config.model.backbone_weights
        report = load_backbone_weights(backbone, Path(path))
        logger.info("Backbone weights from %s\n%s", path, report)
        _warn_of_other_statistics(config.input, report.metadata, path)
    head = build(HEAD, config.model.head, "model.head", backbone=backbone)
    return ReIDModel(backbone, head)


def build_trained_model(config: Config, image_size: tuple[int, int]) -> ReIDModel:
    """The network with `model.weights`, and as many cameras as these weights know.

    Raises:
        ConfigError: `model.weights` is not set.
        WeightsError: The weights do not fit.
    """
    if not config.model.weights:
        raise ConfigError("model.weights: expected a checkpoint to evaluate, it is not set")
    state, _ = read_checkpoint(Path(config.model.weights))
    count = camera_counter(config)
    model = build_model(config, image_size, count(state) if count is not None else 0)
    load_model_weights(model, config)
    return model


def load_model_weights(model: ReIDModel, config: Config) -> None:
    """Loads `model.weights` and logs the report.

    Raises:
        WeightsError: The weights do not fit.
    """
    path = config.model.weights
    state, metadata = read_checkpoint(Path(path))
    logger.info("Model weights from %s\n%s", path, load_weights(model, state, source=path))
    _warn_of_other_statistics(config.input, metadata, path)


def _warn_of_other_statistics(config: InputConfig, metadata: Mapping[str, str], path: str) -> None:
    """Warns if the weights were trained on pixels that were normalised in another way.

    Raises:
        WeightsError: What the file says of its pixels is not three numbers.
    """
    for key, ours in (("pixel_mean", config.pixel_mean), ("pixel_std", config.pixel_std)):
        if key not in metadata:
            continue
        try:
            theirs = json.loads(metadata[key])
            same = np.allclose(theirs, ours, atol=1e-3)
        except (ValueError, TypeError, RecursionError) as error:
            raise WeightsError(
                f"{path}: expected three numbers as {key} in its metadata, got "
                f"{metadata[key][:80]!r}"
            ) from error
        if not same:
            logger.warning(
                "input.%s is %s, but %s was trained with %s; set it to that if in doubt",
                key,
                list(ours),
                path,
                theirs,
            )


def build_training_model(
    config: Config, size: tuple[int, int], images: TrainImages, device: torch.device
) -> ReIDModel:
    """The network that a run trains, on its device, with the weights that training starts from.

    Raises:
        ConfigError: A part is unknown or an option is wrong.
        DataError: Cameras have far-off numbers.
        WeightsError: The weights do not fit.
    """
    num_cameras = images.count_cameras()
    seen = {record.camid for record in images.load()}
    model = build_model(config, size, num_cameras, sorted({*range(num_cameras)} - seen))
    if config.model.weights:
        load_model_weights(model, config)
    if distributed.is_distributed() or config.model.bn_samples_per_group:
        group_batch_norms(model, config.model.bn_samples_per_group)
    place_model(model, config, device)
    return model


def place_model(model: ReIDModel, config: Config, device: torch.device) -> None:
    """To its device, and compiled if `model.compile` says so."""
    model.to(device)
    if config.model.compile != "off":
        compile_network(model, config.model.compile)


def camera_counter(config: Config) -> Callable[[Mapping[str, Tensor]], int] | None:
    """How to count the cameras that weights of the backbone know; None: it knows of no cameras."""
    name = config.model.backbone.get("name")
    return getattr(BACKBONE.get(name), "count_cameras", None) if name in BACKBONE else None


def renumber_cameras(
    config: Config,
    train: TrainImages | None,
    records: Sequence[ImageRecord],
    dataset: ReIDDataset,
) -> list[ImageRecord]:
    """Images of a test set as the model sees them: a camera has the number it had in training.

    Args:
        config: Of the model.
        train: What it was trained on; None: not known, the dataset's own numbers stay.
        records: The images.
        dataset: They are of it.

    Raises:
        DataError: The training sets' files are not what was expected.
    """
    if train is None or camera_counter(config) is None:
        return list(records)
    return train.renumber_cameras(records, dataset)
