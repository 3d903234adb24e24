"""Builds the network of a config and loads its weights."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reid import distributed
from reid.assembly.cameras import Camera, carry_cameras, read_cameras, training_cameras
from reid.assembly.data import TrainImages
from reid.config import Config, InputConfig
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.compiling import compile_network
from reid.modeling.domain_batchnorm import split_batch_norms
from reid.modeling.model import ReIDModel
from reid.modeling.precision import keep_strided_convolutions_exact
from reid.modeling.weights import (
    WeightsError,
    is_cut_backbone,
    load_backbone_weights,
    load_weights,
    read_checkpoint,
    read_metadata,
    tell_trained_size,
)
from reid.registry import BACKBONE, HEAD, ConfigError, build
from reid.shipped import find_shipped

logger = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of this process; with several processes, the GPU of its local rank.

    Raises:
        ConfigError: `name` asks for CUDA, but torch sees no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} needs CUDA, but torch sees no CUDA device")
    if name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    return torch.device(name)


def build_model(
    config: Config,
    image_size: tuple[int, int],
    num_cameras: int,
    unseen_cameras: Sequence[int] = (),
    *,
    training: bool = True,
) -> ReIDModel:
    """Builds the network with its pre-trained backbone; does not load `model.weights` yet.

    The backbone's weights are loaded before the head is built, because a head may take over or copy
    layers of the backbone. If `model.weights` is set, `model.backbone_weights` is not read and the
    backbone's `pretrained` does nothing, because `model.weights` contains the backbone.

    Args:
        config: Of the run.
        image_size: (H, W) in pixels.
        num_cameras: Of the training images.
        unseen_cameras: Those without a training image.
        training: Warn if the backbone's weights were trained with other pixel statistics.

    Raises:
        ConfigError: A part is unknown or an option is wrong.
        WeightsError: The weights do not fit.
    """
    spec = config.model.backbone
    if config.model.weights and spec.get("pretrained") is True:
        spec = {**spec, "pretrained": False}  # else a trained model would need the network
    backbone = build(
        BACKBONE,
        spec,
        "model.backbone",
        image_size=image_size,
        num_cameras=num_cameras,
        unseen_cameras=unseen_cameras,
    )
    if config.model.backbone_weights and not config.model.weights:
        path = config.model.backbone_weights
        report = load_backbone_weights(backbone, find_shipped(path))
        logger.info("Backbone weights from %s\n%s", path, report)
        if training:  # else `adopt_training` has told
            _warn_of_other_statistics(config.input, report.metadata, path)
    head = build(HEAD, config.model.head, "model.head", backbone=backbone)
    return ReIDModel(backbone, head)


def build_trained_model(config: Config, image_size: tuple[int, int]) -> ReIDModel:
    """Builds the network with `model.weights` and the number of cameras that they know.

    If only `model.backbone_weights` is set, the neck and head are untrained.

    Raises:
        ConfigError: Neither setting has a file.
        WeightsError: The weights do not fit.
    """
    if not config.model.weights and config.model.backbone_weights:
        logger.info(
            "Only the backbone's weights are given (%s): neck and head are untrained",
            config.model.backbone_weights,
        )
        return build_model(config, image_size, 0, training=False)
    if not config.model.weights:
        raise ConfigError("model.weights: expected a checkpoint to evaluate, but it is not set")
    state, _ = read_checkpoint(Path(config.model.weights))
    count = camera_counter(config)
    model = build_model(config, image_size, count(state) if count is not None else 0)
    load_model_weights(model, config)
    return model


def load_model_weights(
    model: ReIDModel, config: Config, cameras: Sequence[Camera] | None = None
) -> None:
    """Loads `model.weights` and logs the report.

    Args:
        model: The weights are loaded into it.
        config: Names the file.
        cameras: The cameras of the training images, if training continues from these weights; see
            `carry_cameras`. None: the model has the cameras of the weights.

    Raises:
        WeightsError: The weights do not fit.
    """
    path = config.model.weights
    state, metadata = read_checkpoint(Path(path))
    names: list[str] = []
    if cameras is not None:  # in tests, `adopt_training` compares the whole input
        _warn_of_other_statistics(config.input, metadata, path)
        names = [
            name
            for name in (model.state_dict() if model.num_cameras else ())
            if name.removeprefix("backbone.") in getattr(model.backbone, "dataset_specific", ())
        ]
        old = read_cameras(metadata, path)
        for name in names:
            if name in state:
                fitted = model.resize_tensor(name, state[name])
                table = state[name] if fitted is None else fitted
                state[name] = carry_cameras(table, old, cameras, path)
        if any(name not in state for name in names):
            logger.info("Cameras: %s has no camera embeddings; those here start anew", path)
    tell_trained_size(model.backbone, metadata)
    try:
        report = load_weights(model, state, source=path, allow_missing=names)
    except WeightsError as error:
        if any(name.startswith("head.") for name in state):
            raise
        raise WeightsError(f"{error}\n{_whole_model_hint(metadata)}") from error
    logger.info("Model weights from %s\n%s", path, report)


def _whole_model_hint(metadata: Mapping[str, str]) -> str:
    if is_cut_backbone(metadata):
        whole = metadata.get("source", "the whole model")
        return (
            "This is only a backbone. To go on from its whole model, set model.weights to "
            f"{whole}; to start from a backbone, set model.backbone_weights"
        )
    return "This is only a backbone: set model.backbone_weights to it"


def _warn_of_other_statistics(config: InputConfig, metadata: Mapping[str, str], path: str) -> None:
    """Warns if the weights were trained with another normalisation of pixels.

    Raises:
        WeightsError: The file's mean or standard deviation is not three numbers.
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
                "input.%s is %s, but %s was trained with %s; if in doubt, set it to the latter",
                key,
                list(ours),
                path,
                theirs,
            )


def build_training_model(
    config: Config, size: tuple[int, int], images: TrainImages, device: torch.device
) -> ReIDModel:
    """The network that a run trains, on its device, with its starting weights.

    Raises:
        ConfigError: A part is unknown or an option is wrong.
        DataError: The camera numbers have large gaps, or images lack what the backbone needs.
        WeightsError: The weights do not fit.
    """
    cameras = training_cameras(images)
    unseen = [number for number, camera in enumerate(cameras) if not camera.seen]
    model = build_model(config, size, len(cameras), unseen)
    check_images = getattr(model.backbone, "check_images", None)
    if check_images is not None:
        check_images(images.load())
    if config.model.weights:
        load_model_weights(model, config, cameras)
    if config.model.domain_bn:
        model.domain_split = split_batch_norms(model, images.source_domains)
    if distributed.is_distributed() or config.model.bn_samples_per_group:
        group_batch_norms(model, config.model.bn_samples_per_group, config.model.bn_running)
    if device.type == "cpu" and config.solver.amp != "off":
        changed = keep_strided_convolutions_exact(model)
        if changed:
            logger.info(
                "%d strided convolutions stay in float32: bfloat16 ones can be wrong on a CPU",
                changed,
            )
    place_model(model, config, device)
    return model


def build_more_students(
    config: Config, size: tuple[int, int], images: TrainImages, device: torch.device
) -> dict[str, ReIDModel]:
    """The networks of `model.students`, which are trained beside the model: `student2` and so on.

    Raises:
        ConfigError: A part is unknown or an option is wrong.
        DataError: The camera numbers have large gaps.
        WeightsError: The weights do not fit.
    """
    students = {}
    for number, path in enumerate(config.model.students, 2):
        own = copy.copy(config)
        own.model = replace(config.model, weights=path or config.model.weights)
        students[f"student{number}"] = build_training_model(own, size, images, device)
    return students


def place_model(model: ReIDModel, config: Config, device: torch.device) -> None:
    """Moves the network to its device, and compiles it if `model.compile` says so."""
    model.to(device)
    if config.model.compile != "off":
        compile_network(model, config.model.compile)


def camera_counter(config: Config) -> Callable[[Mapping[str, Tensor]], int] | None:
    """The function that counts the cameras in a backbone's weights; None: it uses no cameras."""
    name = config.model.backbone.get("name")
    count = getattr(BACKBONE.get(name), "count_cameras", None) if name in BACKBONE else None
    views = config.model.backbone.get("num_views")
    return partial(count, num_views=views) if count is not None and views else count


def known_cameras(config: Config, train: TrainImages | None) -> list[Camera] | None:
    """The cameras of a trained model, named by its weights or else by its training sets.

    None: the model uses no cameras, or neither source names them; camera numbers then stay as they
    are.

    Raises:
        DataError: The training sets' files are not what was expected.
        WeightsError: The weights cannot be read.
    """
    if camera_counter(config) is None:
        return None
    path = config.model.weights
    cameras = read_cameras(read_metadata(Path(path)), path) if path else None
    if cameras is None and train is not None:
        cameras = training_cameras(train)
    return cameras
