"""Features of a file as an array on disk that is mapped into memory, whatever its size."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from reid.evaluation.npz_files import check_numbers, check_unpacked, read_arrays
from reid.file_kinds import read_head
from reid.files import InputError, OutputError, open_regular
from reid.modeling.screening import check_directory, check_safetensors_file, is_safetensors
from reid.structures import DataError

_ROWS = 65_536
_NUMPY, _ZIP = b"\x93NUMPY", b"PK"
_NAME = "features"

Room = Callable[[tuple[int, int]], npt.NDArray[np.float32]]
"""Gives an array on disk of a shape, to copy features to."""


def map_features(path: Path) -> npt.NDArray[np.float32] | None:
    """The features (N, D) of an .npy file in single precision, where they lie.

    Changes to them are not written to the file. None: `copy_features` must copy them first.

    Raises:
        DataError: The file is missing or broken.
    """
    with _reported(path):
        if not read_head(path).startswith(_NUMPY):
            return None
        found = np.load(path, mmap_mode="c", allow_pickle=False)
        check_numbers(found, _NAME, path)
        if found.dtype != np.float32 or not found.flags.c_contiguous or not len(found):
            return None
        return np.asarray(found)


def copy_features(path: Path, room: Room) -> None:
    """Copies the features (N, D) of a file in single precision, never holding all in memory.

    Args:
        path: .npy of (N, D) numbers; or .npz or .safetensors with `features`, such as those of
            tools/extract.py. The content decides, not the suffix.
        room: Where they are copied to.

    Raises:
        DataError: The file is missing or broken, or has no such features.
    """
    with _reported(path):
        head = read_head(path)
        if head.startswith(_NUMPY):
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            check_numbers(found, _NAME, path)
            _copy(room, found.shape, lambda first, last: found[first:last])
        elif is_safetensors(head):
            check_safetensors_file(path)
            with safe_open(path, framework="np") as file:
                if _NAME not in file.keys():  # noqa: SIM118  (the file is no mapping)
                    raise DataError(f"{path}: has no tensor {_NAME!r}")
                part = file.get_slice(_NAME)
                shape = tuple(part.get_shape())
                check_numbers(np.empty((0, *shape[1:]), part[:0].dtype), _NAME, path)
                _copy(room, shape, lambda first, last: part[first:last])
        elif head.startswith(_ZIP):
            _copy_of_archive(path, room)
        else:
            raise DataError(
                f"{path}: expected features as .npy, or as .npz or .safetensors of tools/extract.py"
            )


def read_camids(path: Path) -> npt.NDArray[np.int64] | None:
    """The camera numbers (N,) in a file of `map_features`; None: it has none, or none is known.

    Raises:
        DataError: The file is broken.
    """
    with _reported(path):
        head = read_head(path)
        if is_safetensors(head):
            with safe_open(path, framework="np") as file:
                found = file.get_tensor("camids") if "camids" in file.keys() else None  # noqa: SIM118
        elif head.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                there = "camids.npy" in archive.namelist()
            found = read_arrays(path, ["camids"])["camids"] if there else None
        else:
            found = None
    if found is None:
        return None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(f"{path}: camids must be whole numbers (N,), got {found.dtype}")
    camids: npt.NDArray[np.int64] = found.astype(np.int64, copy=False)
    return camids if (camids >= 0).any() else None


def _copy_of_archive(path: Path, room: Room) -> None:
    check_directory(path)
    with (
        open_regular(path) as raw,
        io.BufferedReader(raw) as file,  # type: ignore[type-var]
        zipfile.ZipFile(file) as archive,
    ):
        check_unpacked(archive, path)
        name = f"{_NAME}.npy"
        if name not in archive.namelist():
            raise DataError(
                f"{path}: has no array {_NAME!r}; expected what tools/extract.py writes"
            )
        with archive.open(name) as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            check_numbers(np.empty((0, *shape[1:]), dtype), _NAME, path)
            size = archive.getinfo(name).file_size
            if fortran or member.tell() + int(np.prod(shape)) * dtype.itemsize != size:
                raise DataError(f"{path}: {_NAME} is stored by columns, or is cut off")
            _copy(room, shape, lambda first, last: _read(member, last - first, shape, dtype))


def _read(member: Any, rows: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    data = member.read(rows * shape[1] * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(rows, shape[1])


def _copy(
    room: Room,
    shape: tuple[int, ...],
    part: Callable[[int, int], npt.NDArray[Any]],
) -> None:
    if not shape[0]:
        raise DataError("there is no feature")
    target = room((shape[0], shape[1]))
    for first in range(0, shape[0], _ROWS):
        last = min(first + _ROWS, shape[0])
        target[first:last] = part(first, last)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turns the errors of libraries that read a broken file into a `DataError`."""
    try:
        yield
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{path}: {error}") from error
    except InputError as error:
        raise DataError(str(error)) from error
    except (MemoryError, OutputError):
        raise
    except Exception as error:  # numpy, zipfile and safetensors raise many kinds
        raise DataError(f"{path}: cannot be read as features ({error})") from error
