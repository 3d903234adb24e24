"""Writes a model's thresholds beside its weights, and reads them again."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from reid.checking import from_mapping
from reid.evaluation.thresholds import Thresholds
from reid.files import read_json, readable_name, write_text
from reid.shipped import tool
from reid.structures import DataError

logger = logging.getLogger(__name__)

_SUFFIX = ".thresholds.json"


@dataclass(frozen=True)
class _File:
    """What the file holds."""

    format: Literal[1]
    fingerprint: str
    thresholds: Thresholds


def thresholds_path(weights: Path) -> Path:
    """Where the thresholds of a model are: beside its weights, under their name."""
    return weights.with_suffix(_SUFFIX)


def load_thresholds(weights: Path, fingerprint: str) -> Thresholds | None:
    """The thresholds beside a model's weights; None: there are none of this model.

    Thresholds of other weights, or of another size or flip-test, are ignored with a warning.

    Args:
        weights: The model's file.
        fingerprint: Of the model; see `ModelCard`.

    Raises:
        DataError: The file is broken.
    """
    path = thresholds_path(weights)
    if not path.exists():
        return None
    try:
        content = from_mapping(_File, read_json(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: is no file of thresholds ({error}); remove it, or make it anew with "
            f"{tool('thresholds')}"
        ) from error
    if content.fingerprint != fingerprint:
        logger.warning(
            "%s: belongs to another model than %s, or to another input size or flip-test; it is "
            "ignored. Make it again with %s",
            path,
            weights.name,
            tool("thresholds"),
        )
        return None
    return content.thresholds


def save_thresholds(weights: Path, fingerprint: str, thresholds: Thresholds) -> Path:
    """Writes thresholds beside a model's weights, whole or not at all; gives the file.

    Args:
        weights: The model's file.
        fingerprint: Of the model.
        thresholds: To write.

    Raises:
        OutputError: The file cannot be written.
    """
    path = thresholds_path(weights)
    thresholds = replace(thresholds, data=readable_name(thresholds.data))
    content = asdict(_File(1, fingerprint, thresholds))
    write_text(path, json.dumps(content, indent=2) + "\n")
    return path
