"""Writes into weights files how they were trained, and adopts these settings from a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reid.assembly.cameras import Camera, dump_cameras
from reid.checking import ConfigError
from reid.config import Config
from reid.modeling.model import ReIDModel
from reid.modeling.weights import WeightsError, read_metadata
from reid.structures import ImageRecord

logger = logging.getLogger(__name__)

_INPUT = {
    "image_size": "size",
    "pixel_mean": "pixel_mean",
    "pixel_std": "pixel_std",
    "interpolation": "test_interpolation",
}
"""Key in a file's metadata -> setting in `input`."""


def describe_course(records: Sequence[ImageRecord]) -> dict[str, str]:
    """Facts beside the config that change a run's bits: images' paths and sizes, CPU threads."""
    digest = hashlib.sha256()
    for record in records:
        try:
            size = os.path.getsize(record.path)  # noqa: PTH202  (a million paths)
        except OSError:  # the loader reports it later
            size = -1
        digest.update(f"{record.path}\0{size}\n".encode("utf-8", "surrogateescape"))
    return {"images": digest.hexdigest(), "cpu_threads": str(torch.get_num_threads())}


def describe_training(
    config: Config, model: ReIDModel, cameras: Sequence[Camera], identities: int
) -> dict[str, str]:
    """Describes a training for the metadata of its weights files.

    Args:
        config: The run's config.
        model: The run's model.
        cameras: The cameras of the training images, in the order of their numbers in the model.
        identities: Number of identities in the training images; 0: unlabelled.
    """
    settings: dict[str, Any] = {
        **{name: getattr(config.input, key) for name, key in _INPUT.items()},
        "num_cameras": model.num_cameras,
        "identities": identities,
        "feature_dim": model.embed_dim,
        "backbone": config.model.backbone,
        "head": config.model.head,
        "plugins": config.plugins,
    }
    return {
        **{key: json.dumps(value) for key, value in settings.items()},
        "cameras": dump_cameras(cameras if model.num_cameras else ()),
        "reid_version": version("reid"),
    }


def adopt_training(config: Config) -> None:
    """Adopts image size, pixel statistics, interpolation and network from `model.weights`.

    Settings that the config gives win; a warning names any difference in the input settings.
    Weights without such metadata, for example from other code, change nothing. With
    `model.backbone_weights` alone, everything but the head is adopted from that file.

    Args:
        config: Changed in place.

    Raises:
        WeightsError: The file is missing or broken, or its metadata is wrong.
    """
    path = config.model.weights or config.model.backbone_weights
    if not path:
        return
    metadata = read_metadata(Path(path))
    for name, key in _INPUT.items():
        if name in metadata:
            _adopt_input(config, key, _read(metadata, name, path), path)
    for name in ("backbone", "head") if config.model.weights else ("backbone",):
        key = f"model.{name}"
        if name in metadata and not config.is_given(key):
            spec = _read(metadata, name, path)
            if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
                raise WeightsError(f"{path}: expected a part as {name} in its metadata")
            if spec != getattr(config.model, name):
                setattr(config.model, name, spec)
                logger.info("%s is %s, as %s says", key, spec["name"], path)
    if "plugins" in metadata and not config.is_given("plugins"):
        names = _read(metadata, "plugins", path)
        # A file may only import projects of this framework, never other code.
        config.plugins += [
            name
            for name in names
            if isinstance(name, str)
            and name.isidentifier()
            and name not in config.plugins
            and find_spec(f"reid.projects.{name}")
        ]


def _adopt_input(config: Config, key: str, trained_with: Any, path: str) -> None:
    ours = getattr(config.input, key)
    value = tuple(trained_with) if isinstance(trained_with, list) else trained_with
    if _same(ours, value):
        return
    where = f"input.{key}"
    if config.is_given(where):
        logger.warning(
            "%s is %s, but %s was trained with %s; results may be worse",
            where,
            _text(ours),
            path,
            _text(value),
        )
        return
    setattr(config.input, key, value)
    try:
        type(config.input)(**vars(config.input))  # building it checks the values
    except ConfigError as error:
        raise WeightsError(f"{path}: its metadata: {error}") from error
    logger.info("%s is %s, as %s was trained", where, _text(value), path)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    try:
        return bool(np.shape(one) == np.shape(other) and np.allclose(one, other, atol=1e-3))
    except (TypeError, ValueError):
        return False


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _read(metadata: Mapping[str, str], name: str, path: str) -> Any:
    load: Callable[[str], Any] = json.loads
    try:
        return load(metadata[name])
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: expected JSON as {name} in its metadata, got {metadata[name][:80]!r}"
        ) from error
