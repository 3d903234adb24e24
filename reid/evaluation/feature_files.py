"""Reads query and gallery features from files of this project or of other code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reid.data.datasets.csv_dataset import read_csv
from reid.evaluation.feature_rows import ARRAYS, FeatureRows, read_feature_rows, rows_of_arrays
from reid.evaluation.npz_files import check_numbers, read_arrays
from reid.file_kinds import read_head
from reid.files import InputError
from reid.modeling.screening import is_safetensors
from reid.structures import DataError, FeatureSet

logger = logging.getLogger(__name__)

_SPLITS = ("query", "gallery")
_PIECE_BYTES = 64 * 2**20
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
_SHOWN = 10


class LoadedFeatures(NamedTuple):
    """Features from a file.

    Attributes:
        query: Q features of unit length.
        gallery: Features of unit length.
        query_paths: Q paths of the queries' images, if a list gave them.
        gallery_paths: Paths of the gallery's images, if a list gave them.
    """

    query: FeatureSet
    gallery: FeatureSet
    query_paths: list[str] | None = None
    gallery_paths: list[str] | None = None


def load_features(
    path: Path, csv: Path | None = None, *, any_split: bool = False
) -> LoadedFeatures:
    """Query and gallery of a file of features, with features made unit vectors.

    The scale of the features does not matter, apart from rounding in the file. Rows of zeros have
    no direction; they stay zero, and a warning names them.

    Args:
        path: With `query_feat` (Q, D), `gallery_feat` (G, D), `query_pids`, `gallery_pids`,
            `query_camids` and `gallery_camids`; or with `features` (N, D), if there is a list; or
            what `tools/extract.py` wrote, as .npz or .safetensors.
        csv: A list of N images, in the order of the features; training images are skipped.
        any_split: If a file of `tools/extract.py` has neither query nor gallery images, all of its
            images become queries, and the gallery is empty.

    Raises:
        DataError: A file is missing or broken, or unpacks to far more than its size; an array is
            missing, lengths do not fit, values are not finite, or all features of a split are
            zeros. Or there is too little memory.
    """
    with telling_memory(path):
        if csv is None:
            names = ("feat", "pids", "camids")
            wanted = [f"{split}_{name}" for split in _SPLITS for name in names]
            if is_safetensors(_head(path)):
                return _of_rows(read_feature_rows(path), path, any_split)
            arrays = read_arrays(path, wanted, instead=ARRAYS)
            if "features" in arrays:
                return _of_rows(rows_of_arrays(arrays, path), path, any_split)
            query, gallery = (_feature_set(arrays, split, path) for split in _SPLITS)
            return LoadedFeatures(query, gallery)
        rows = read_csv(csv, allow_outside=True)  # no image is opened
        if is_safetensors(_head(path)):
            features: npt.NDArray[Any] = read_feature_rows(path).features
        else:
            features = read_arrays(path, ["features"])["features"]
        check_numbers(features, "features", path)
        if len(features) != len(rows):
            raise DataError(
                f"{path}: has {len(features)} features, but {csv} lists {len(rows)} images"
            )
        found, paths = [], []
        for split in _SPLITS:
            places = [place for place, (name, _) in enumerate(rows) if name == split]
            if not places:
                raise DataError(f"{csv}: lists no image of the split {split!r}")
            records = [rows[place][1] for place in places]
            chosen = {
                f"{split}_feat": features[places],
                f"{split}_pids": np.array([record.pid for record in records]),
                f"{split}_camids": np.array([record.camid for record in records]),
            }
            found.append(_feature_set(chosen, split, path))
            paths.append([record.path for record in records])
        return LoadedFeatures(found[0], found[1], paths[0], paths[1])


def _of_rows(rows: FeatureRows, path: Path, any_split: bool) -> LoadedFeatures:
    """Query and gallery of a file of `tools/extract.py`.

    Raises:
        DataError: It lacks one of them.
    """
    places = [rows.rows_of(split) for split in _SPLITS]
    if any_split and not any(map(len, places)):
        places = [np.arange(len(rows)), np.arange(0)]
    elif not all(map(len, places)):
        there = sorted({split for split in rows.splits if split}) or ["none"]
        raise DataError(
            f"{path}: expected query and gallery images, but its splits are {', '.join(there)}; "
            "extract a data set that has both, or give their list with --csv"
        )
    found = []
    for split, which in zip(_SPLITS, places, strict=True):
        columns = {
            f"{split}_feat": rows.features[which],
            f"{split}_pids": rows.pids[which],
            f"{split}_camids": rows.camids[which],
        }
        found.append(_feature_set(columns, split, path))
    paths = [[rows.paths[place] for place in which.tolist()] for which in places]
    return LoadedFeatures(found[0], found[1], paths[0], paths[1])


def _head(path: Path) -> bytes:
    """The first bytes of a file; empty if the path is not a file."""
    try:
        return read_head(path) if path.is_file() else b""
    except InputError as error:
        raise DataError(str(error)) from error


@contextmanager
def telling_memory(path: Path) -> Iterator[None]:
    """Turns every library's out-of-memory error into one that names the file.

    Raises:
        DataError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(word in text for word in _NO_MEMORY):
            raise
        reason = text.splitlines()[0] if text else "there is no more"
        raise DataError(
            f"{path}: memory is too small for its features ({reason}); use a machine with "
            "more memory, fewer images, or features of fewer dimensions"
        ) from error


def _features(values: npt.NDArray[Any], name: str, path: Path) -> Tensor:
    """Features (N, D) as unit vectors; rows of zeros are named."""
    check_numbers(values, name, path)
    features = np.empty(values.shape, np.float32)
    height = max(1, _PIECE_BYTES // (8 * values.shape[1]))
    zeros: list[int] = []
    for start in range(0, len(values), height):
        # The square of a float32 overflows from 1e19 on and underflows below 1e-23; values divided
        # by the largest of their row are safe.
        rows = values[start : start + height].astype(np.result_type(values.dtype, np.float64))
        largest = np.abs(rows).max(1, keepdims=True)
        if not np.isfinite(largest).all():
            row = start + int(np.flatnonzero(~np.isfinite(largest))[0])
            raise DataError(f"{path}: {name} has values that are not finite, first in {row=}")
        zeros += (start + np.flatnonzero(largest == 0)).tolist()
        rows /= np.where(largest == 0, 1, largest)
        length = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
        features[start : start + height] = rows / np.where(length == 0, 1, length)
    if zeros and len(zeros) == len(values):
        raise DataError(f"{path}: all {len(values):,} rows of {name} are zeros")
    if zeros:
        logger.warning(
            "%s: %s of %s rows of %s are zeros and match no image: row %s%s",
            path,
            f"{len(zeros):,}",
            f"{len(values):,}",
            name,
            ", ".join(map(str, zeros[:_SHOWN])),
            ", ..." if len(zeros) > _SHOWN else "",
        )
    return torch.from_numpy(features)


def _feature_set(arrays: Mapping[str, Any], split: str, path: Path) -> FeatureSet:
    feature = _features(arrays[f"{split}_feat"], f"{split}_feat", path)
    ids: list[Tensor] = []
    for name in (f"{split}_pids", f"{split}_camids"):
        values = arrays[name]
        if values.shape != (len(feature),) or values.dtype.kind not in "iu":
            raise DataError(
                f"{path}: {name} must be {len(feature)} whole numbers, got {values.dtype} "
                f"{values.shape}"
            )
        ids.append(torch.from_numpy(values.astype(np.int64)))
    try:
        return FeatureSet.of(feature, *ids)
    except ValueError as error:
        raise DataError(f"{path}: {split}: {error}") from error
