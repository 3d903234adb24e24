"""Features of query and gallery from files of any code."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reid.data.datasets.csv_dataset import read_csv
from reid.file_kinds import kind_of_file
from reid.files import InputError, open_regular
from reid.modeling.screening import check_directory
from reid.structures import DataError, FeatureSet

logger = logging.getLogger(__name__)

_MOST_TIMES, _ALLOWANCE = 20, 64 * 2**20  # what an .npz file of features may unpack to, in bytes
_SPLITS = ("query", "gallery")
_PIECE_BYTES = 64 * 2**20
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
_SHOWN = 10


class LoadedFeatures(NamedTuple):
    """Features from a file.

    Attributes:
        query: Q features of unit length.
        gallery: Features of unit length.
        query_paths: Q paths of the queries' images, where a list gave them.
        gallery_paths: Paths of the gallery's images, where a list gave them.
    """

    query: FeatureSet
    gallery: FeatureSet
    query_paths: list[str] | None = None
    gallery_paths: list[str] | None = None


def load_features(path: Path, csv: Path | None = None) -> LoadedFeatures:
    """Query and gallery of an .npz file, with features made unit vectors.

    Features of any scale give the same unit vectors, to the last bit but for what rounding did to
    them before. Rows of zeros, which have no direction, stay and are named in a warning.

    Args:
        path: With `query_feat` (Q, D), `gallery_feat` (G, D), `query_pids`, `gallery_pids`,
            `query_camids` and `gallery_camids`; or with `features` (N, D), if there is a list.
        csv: A list of N images, in the order of the features; images for training are passed over.

    Raises:
        DataError: A file is missing or broken, or unpacks to far more than its size; an array is
            missing, lengths do not fit, values are not finite, or all features of a split are
            zeros. Or memory does not suffice.
    """
    with telling_memory(path):
        if csv is None:
            names = ("feat", "pids", "camids")
            wanted = [f"{split}_{name}" for split in _SPLITS for name in names]
            arrays = _read_arrays(path, wanted)
            query, gallery = (_feature_set(arrays, split, path) for split in _SPLITS)
            return LoadedFeatures(query, gallery)
        rows = read_csv(csv, allow_outside=True)  # no image is opened
        features = _read_arrays(path, ["features"])["features"]
        _check_numbers(features, "features", path)
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


@contextmanager
def telling_memory(path: Path) -> Iterator[None]:
    """Has the errors of short memory, which differ from library to library, name the file.

    Raises:
        DataError: In place of any of them.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(word in text for word in _NO_MEMORY):
            raise
        reason = text.splitlines()[0] if text else "no more is to be had"
        raise DataError(
            f"{path}: memory does not suffice for its features ({reason}); use a machine with "
            "more, fewer images, or features of fewer dimensions"
        ) from error


def _read_arrays(path: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of these names in an .npz file; others are not unpacked."""
    try:
        check_directory(path)
        with open_regular(path) as raw, io.BufferedReader(raw) as file:  # type: ignore[type-var]
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(record.file_size for record in archive.infolist())
            size = path.stat().st_size
            if unpacked > _MOST_TIMES * size + _ALLOWANCE:
                raise ValueError(
                    f"its {size:,} bytes unpack to {unpacked:,}; if that is right, save it with "
                    "numpy.savez, which does not compress"
                )
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                there = list(arrays.files)
                found = {name: arrays[name] for name in names if name in there}
    except InputError as error:
        raise DataError(f"{error}; expected an .npz file") from error
    except MemoryError:
        raise
    except Exception as error:  # numpy, zipfile and zlib have many for broken files
        kind = None
        with suppress(InputError):  # it cannot be read at all, which `error` tells
            kind = kind_of_file(path)
        reason = f"it is {kind.phrase}" if kind is not None and kind.name != "zip" else error
        raise DataError(
            f"{path}: cannot be read as an .npz file ({reason}); expected what numpy.savez writes"
        ) from error
    for name in names:
        if name not in found:
            shown = ", ".join(there[:_SHOWN]) + (", ..." if len(there) > _SHOWN else "")
            raise DataError(f"{path}: has no array {name!r}; it has {shown or 'none'}")
        if not isinstance(found[name], np.ndarray):
            raise DataError(f"{path}: {name} is no array; expected what numpy.savez writes")
    return found


def _check_numbers(values: npt.NDArray[Any], name: str, path: Path) -> None:
    if values.ndim != 2 or not values.shape[1] or values.dtype.kind not in "fiu":
        raise DataError(f"{path}: {name} must be numbers (N, D), got {values.dtype} {values.shape}")


def _features(values: npt.NDArray[Any], name: str, path: Path) -> Tensor:
    """Features (N, D) as unit vectors; rows of zeros are named."""
    _check_numbers(values, name, path)
    features = np.empty(values.shape, np.float32)
    height = max(1, _PIECE_BYTES // (8 * values.shape[1]))
    zeros: list[int] = []
    for start in range(0, len(values), height):
        # A square of float32 is out of range from 1e19 on and below 1e-23, one of a value that was
        # divided by the largest of its row never.
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
            "%s: %s of %s rows of %s are zeros, which are like no image: row %s%s",
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
