"""Arrays of .npz files, read within bounds."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reid.file_kinds import kind_of_file
from reid.files import InputError, open_regular
from reid.modeling.screening import check_directory
from reid.structures import DataError

_MOST_TIMES, _ALLOWANCE = 20, 64 * 2**20  # what an .npz file of features may unpack to, in bytes
_SHOWN = 12


def read_arrays(
    path: Path, names: Sequence[str], instead: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Reads the named arrays of an .npz file; others are not unpacked.

    Args:
        path: The file.
        names: Names of the arrays.
        instead: If the file has all of these, they are read in place of `names`.

    Raises:
        DataError: The file is missing or broken, unpacks to far more than its size, or lacks one.
    """
    try:
        check_directory(path)
        with open_regular(path) as raw, io.BufferedReader(raw) as file:  # type: ignore[type-var]
            with zipfile.ZipFile(file) as archive:
                check_unpacked(archive, path)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                there = list(arrays.files)
                if instead and all(name in there for name in instead):
                    names = instead
                found = {name: arrays[name] for name in names if name in there}
    except InputError as error:
        raise DataError(f"{error}; expected an .npz file") from error
    except MemoryError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many kinds for broken files
        kind = None
        with suppress(InputError):  # the file cannot be read at all, as `error` says
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
            raise DataError(f"{path}: {name} is not an array; expected what numpy.savez writes")
    return found


def check_unpacked(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuses an .npz file that unpacks to far more than its size.

    Raises:
        ValueError: It does.
    """
    unpacked, size = sum(record.file_size for record in archive.infolist()), path.stat().st_size
    if unpacked > _MOST_TIMES * size + _ALLOWANCE:
        raise ValueError(
            f"its {size:,} bytes unpack to {unpacked:,}; if that is intended, save it with "
            "numpy.savez, which does not compress"
        )


def check_numbers(values: npt.NDArray[Any], name: str, path: Path) -> None:
    """Requires an array to be features (N, D).

    Raises:
        DataError: It has another shape or type.
    """
    if values.ndim != 2 or not values.shape[1] or values.dtype.kind not in "fiu":
        raise DataError(f"{path}: {name} must be numbers (N, D), got {values.dtype} {values.shape}")
