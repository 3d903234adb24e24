"""Features, and what is known about their images, in one file: .npz or .safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reid.evaluation.npz_files import check_numbers, read_arrays
from reid.file_kinds import read_head
from reid.files import replacing
from reid.modeling.screening import RefusedError, check_safetensors_file, is_safetensors
from reid.shipped import tool
from reid.structures import DataError, FeatureSet

SUFFIXES = (".npz", ".safetensors")
_TEXTS = ("paths", "cameras", "splits")
_NUMBERS = ("pids", "camids")
ARRAYS = ("features", *_TEXTS, *_NUMBERS, "provenance")
"""The arrays of an .npz file of rows."""


@dataclass(frozen=True)
class FeatureRows:
    """Features of N images, and what is known about each.

    Attributes:
        features: (N, D) float32 unit vectors.
        paths: N paths of the images, as they were given.
        cameras: N names of cameras; empty: unknown.
        splits: N of `train`, `query`, `gallery`; empty: no split.
        pids: (N,) int64 identities; -1: unlabelled.
        camids: (N,) int64, the cameras' numbers in their data set; -1: unknown.
        provenance: The model (`fingerprint`, `weights`, `weights_sha256`), the settings and the
            versions that made them, and the images that could not be read (`unreadable`).

    Raises:
        ValueError: Lengths or types do not match.
    """

    features: npt.NDArray[np.float32]
    paths: list[str]
    cameras: list[str]
    splits: list[str]
    pids: npt.NDArray[np.int64]
    camids: npt.NDArray[np.int64]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        count = len(self.features)
        for name in (*_TEXTS, *_NUMBERS):
            given = len(getattr(self, name))
            if given != count:
                raise ValueError(f"{name}: expected {count}, one for each feature, got {given}")
        for name in _NUMBERS:
            values = getattr(self, name)
            if values.ndim != 1 or values.dtype != np.int64 or (count and values.min() < -1):
                raise ValueError(f"{name}: expected whole numbers from -1, got {values.dtype}")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint; see `ModelCard`. Empty: the file has none."""
        value = self.provenance.get("fingerprint", "")
        return value if isinstance(value, str) else ""

    def rows_of(self, split: str) -> npt.NDArray[np.int64]:
        """The rows of a split."""
        return np.flatnonzero(np.array(self.splits) == split)

    def feature_set(self, rows: npt.NDArray[np.int64] | None = None) -> FeatureSet:
        """The features of some rows, or of all, in the form that evaluation takes."""
        chosen = np.arange(len(self)) if rows is None else rows
        return FeatureSet.of(
            torch.from_numpy(self.features[chosen]),
            torch.from_numpy(self.pids[chosen]),
            torch.from_numpy(self.camids[chosen]),
        )


def write_feature_rows(path: Path, rows: FeatureRows) -> None:
    """Writes an .npz or a .safetensors file, by the suffix of the path, whole or not at all.

    An .npz file has `features`, `pids` and `camids` as numbers, `paths`, `cameras` and `splits` as
    text, and `provenance` as JSON. A .safetensors file cannot hold text: there, these four are the
    bytes of JSON in UTF-8.

    Raises:
        ValueError: The path has another suffix.
        OutputError: The file cannot be written.
    """
    numbers = {"features": rows.features, "pids": rows.pids, "camids": rows.camids}
    texts: dict[str, Any] = {name: getattr(rows, name) for name in _TEXTS}
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file name that ends in {' or '.join(SUFFIXES)}")
    with replacing(path) as temporary:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {
                **numbers,
                "provenance": np.array(json.dumps(rows.provenance)),
            }
            arrays |= {name: np.array(text, np.str_) for name, text in texts.items()}
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
        else:
            texts["provenance"] = rows.provenance
            encoded = {
                name: np.frombuffer(json.dumps(text).encode(), np.uint8)
                for name, text in texts.items()
            }
            whole = {name: np.ascontiguousarray(value) for name, value in numbers.items()}
            save_file({**whole, **encoded}, temporary)


def read_feature_rows(path: Path) -> FeatureRows:
    """Reads a file of `write_feature_rows`; its content, not its suffix, decides the format.

    Raises:
        DataError: The file is missing or broken, has another format, or holds a feature that is
            not finite.
    """
    if path.is_file() and is_safetensors(read_head(path)):
        return _from_safetensors(path)
    return rows_of_arrays(read_arrays(path, ARRAYS), path)


def rows_of_arrays(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> FeatureRows:
    """Rows from the arrays of an .npz file.

    Raises:
        DataError: An array has a wrong type or shape.
    """
    for name in (*_TEXTS, "provenance"):
        if arrays[name].dtype.kind not in "US" or arrays[name].ndim != (name in _TEXTS):
            raise DataError(f"{path}: {name} must be text, got {arrays[name].dtype}")
    texts = {name: arrays[name].tolist() for name in _TEXTS}
    return _rows(arrays, texts, _read_json(str(arrays["provenance"]), "provenance", path), path)


def _from_safetensors(path: Path) -> FeatureRows:
    try:
        check_safetensors_file(path)
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            missing = [name for name in ARRAYS if name not in names]
            if missing:
                raise DataError(
                    f"{path}: lacks {', '.join(missing)}; expected features with paths and "
                    f"provenance, in a file of {tool('extract')}"
                )
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
    except (SafetensorError, RefusedError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error})") from error
    decoded = {
        name: _read_json(arrays[name].tobytes().decode("utf-8", "replace"), name, path)
        for name in (*_TEXTS, "provenance")
    }
    for name in _TEXTS:
        values = decoded[name]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise DataError(f"{path}: expected a list of text as {name}")
    return _rows(arrays, decoded, decoded["provenance"], path)


def _rows(
    numbers: Mapping[str, npt.NDArray[Any]],
    texts: Mapping[str, list[str]],
    provenance: Any,
    path: Path,
) -> FeatureRows:
    """Checks the numbers and makes rows of them."""
    check_numbers(numbers["features"], "features", path)
    features = numbers["features"].astype(np.float32, copy=False)
    finite = np.isfinite(features).all(1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise DataError(f"{path}: features has values that are not finite, first in {row=}")
    if not isinstance(provenance, dict):
        raise DataError(f"{path}: expected a mapping as provenance")
    for name in _NUMBERS:
        if numbers[name].dtype.kind not in "iu":
            raise DataError(f"{path}: {name} must be whole numbers, got {numbers[name].dtype}")
    try:
        return FeatureRows(
            features=features,
            provenance=provenance,
            **{name: list(texts[name]) for name in _TEXTS},  # type: ignore[arg-type]
            **{name: numbers[name].astype(np.int64) for name in _NUMBERS},  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _read_json(text: str, name: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON as {name} ({error})") from error
