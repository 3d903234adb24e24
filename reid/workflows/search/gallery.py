"""A gallery on disk: features with paths, cameras, and the model that they come from.

A gallery is one safetensors file in its own folder, so it is written whole or not at all, and
nothing in it can run. `run.lock` beside it keeps a second writer out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reid.checking import from_mapping
from reid.files import InputError, OutputError, open_regular, remove_leftovers, replacing
from reid.locks import FolderInUse, locked
from reid.modeling.screening import RefusedError, check_safetensors_file
from reid.neighbors.indexes import Index, Kind, restore_index
from reid.neighbors.recall import Recall
from reid.registry import ConfigError
from reid.shipped import tool
from reid.structures import DataError

FILE = "gallery.safetensors"
HASH_BYTES = 16
UNKNOWN = -1

_KEY = "reid_gallery"
_INDEX = "index."
_MOST_CAMERAS = 10_000
_LONGEST_PATH = 2**15
_CHECKED_ROWS = 65_536

Features = npt.NDArray[np.float32]
Hashes = npt.NDArray[np.uint8]


class PathTable(Sequence[str]):
    """Many paths in little memory: they take hardly more than their letters.

    Args:
        letters: (B,) uint8, all paths in one array, in the system's encoding.
        ends: (N,) int64, the end of each path in `letters`.

    Raises:
        ValueError: The ends do not fit the letters, or a path is too long.
    """

    def __init__(self, letters: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        lengths = np.diff(ends, prepend=0)
        if len(ends) and (ends[-1] != len(letters) or not _between(lengths, 1, _LONGEST_PATH)):
            raise ValueError(f"paths: expected 1 to {_LONGEST_PATH:,} bytes each, end to end")
        self.letters, self.ends = letters, ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathTable:
        """The table of some paths."""
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8).copy(), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        start = int(self.ends[place - 1]) if place else 0
        return os.fsdecode(self.letters[start : int(self.ends[place])].tobytes())


class Entries(NamedTuple):
    """Images of a gallery, or to be added to one.

    Attributes:
        features: (N, D) unit vectors.
        paths: N absolute paths, each once.
        cameras: N names; empty where the camera is unknown.
        hashes: (N, 16) the first bytes of the SHA-256 of each file; zeros where it is unknown.
    """

    features: Features
    paths: Sequence[str]
    cameras: Sequence[str]
    hashes: Hashes


@dataclass(frozen=True)
class Origin:
    """The model of a gallery.

    Attributes:
        fingerprint: See `ModelCard`.
        model: Run folder, config or ONNX file, as an absolute path; empty: unknown.
        weights: The file with its weights, as an absolute path; empty: unknown.
        weights_named: Whether loading needs `weights` besides `model`; else the model names them.
        weights_sha256: SHA-256 of the weights; empty: unknown.
    """

    fingerprint: str
    model: str = ""
    weights: str = ""
    weights_sha256: str = ""
    weights_named: bool = False


@dataclass(frozen=True)
class IndexNote:
    """The facts about a gallery's index.

    Attributes:
        kind: Exact, a graph or compressed vectors.
        effort: The effort of searches; see `Index`.
        built_on: Number of images that it was built on, without those added later.
        recall: Against the exact search; None: nothing to measure.
    """

    kind: Kind = "exact"
    effort: int = 1
    built_on: int = 0
    recall: Recall | None = None


@dataclass(frozen=True)
class _Header:
    format: Literal[1]
    origin: Origin
    cameras: list[str]
    index: IndexNote


@dataclass(frozen=True)
class Gallery:
    """The content of a gallery's file.

    Attributes:
        features: (N, D) unit vectors; from a file they are read as they are needed.
        paths: N absolute paths.
        camids: (N,) places in `cameras`; -1: unknown.
        cameras: Names of the cameras.
        hashes: (N, 16); see `Entries`.
        origin: The model.
        note: The index.
        arrays: Of the index.
    """

    features: Features
    paths: PathTable
    camids: npt.NDArray[np.int32]
    cameras: list[str]
    hashes: Hashes
    origin: Origin
    note: IndexNote = field(default_factory=IndexNote)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Entries, origin: Origin) -> Gallery:
        """A gallery without an index.

        Raises:
            DataError: There are too many cameras.
        """
        names = sorted({camera for camera in entries.cameras if camera})
        if len(names) > _MOST_CAMERAS:
            raise DataError(
                f"cameras: expected {_MOST_CAMERAS:,} at most, got {len(names):,}, such as "
                f"{names[0]!r}"
            )
        numbers = {"": UNKNOWN, **{name: number for number, name in enumerate(names)}}
        camids = np.array([numbers[camera] for camera in entries.cameras], np.int32)
        paths = PathTable.of(entries.paths)
        return cls(entries.features, paths, camids, names, entries.hashes, origin)

    def __len__(self) -> int:
        return len(self.features)

    def camera(self, row: int) -> str:
        """The name of an image's camera; empty: unknown."""
        number = int(self.camids[row])
        return self.cameras[number] if number >= 0 else ""

    def entries(self, rows: npt.NDArray[np.int64] | None = None) -> Entries:
        """Some of the images, or all of them."""
        if rows is None:
            rows = np.arange(len(self))
        places = rows.tolist()
        return Entries(
            self.features[rows],
            [self.paths[row] for row in places],
            [self.camera(row) for row in places],
            self.hashes[rows],
        )

    def index(self) -> Index | None:
        """The index; None: a search compares every image.

        Raises:
            ValueError: Its arrays are broken.
        """
        return restore_index(self.note.kind, self.arrays, self.features, self.note.effort)


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Locks a gallery for one writer; removes a new folder that stays empty.

    Raises:
        ConfigError: Another process changes it.
        OutputError: The folder cannot be written to.
    """
    new = not folder.exists()
    if not new and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; expected a folder for the gallery alone")
    try:
        with locked(folder):
            remove_leftovers(folder)
            yield
    except FolderInUse as error:
        raise ConfigError(f"gallery: {error}") from None
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def is_gallery(folder: Path) -> bool:
    """Whether the folder has a gallery, broken or not."""
    return (folder / FILE).exists()


def write_gallery(folder: Path, gallery: Gallery) -> None:
    """Writes a gallery, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    header = _Header(1, gallery.origin, gallery.cameras, gallery.note)
    arrays: dict[str, npt.NDArray[Any]] = {
        "features": gallery.features,
        "path_letters": gallery.paths.letters,
        "path_ends": gallery.paths.ends,
        "camids": gallery.camids,
        "hashes": gallery.hashes,
        **{_INDEX + name: value for name, value in gallery.arrays.items()},
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    path = folder / FILE
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {_KEY: json.dumps(asdict(header))})
        except SafetensorError as error:  # safetensors wraps the system's errors
            raise OutputError(f"{path}: cannot be written ({error}); free space") from error


def read_gallery(folder: Path) -> Gallery:
    """The gallery in a folder; all of it is checked, wherever the file comes from.

    Raises:
        DataError: There is none, or its file is broken.
    """
    path = folder / FILE
    try:
        open_regular(path).close()
        check_safetensors_file(path)
        with safe_open(path, "pt") as file:
            header = _read_header((file.metadata() or {}).get(_KEY))
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        return _checked(header, arrays)
    except InputError as error:
        hint = "" if is_gallery(folder) else f"; make one with {tool('search')} build"
        raise DataError(f"{error}{hint}") from error
    except MemoryError as error:
        raise DataError(f"{path}: there is not enough memory to read it") from error
    # safetensors and torch raise many kinds of errors for broken files
    except (SafetensorError, RefusedError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"{path}: is not a gallery of {tool('search')}, or is broken ({error}); build it again"
        ) from error


def _read_header(text: str | None) -> _Header:
    if text is None:
        raise ValueError(f"its metadata has no {_KEY}")
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("its metadata are nested too deeply") from error
    return from_mapping(_Header, content, _KEY)


def _checked(header: _Header, arrays: dict[str, npt.NDArray[Any]]) -> Gallery:
    """The gallery that such a file holds.

    Raises:
        ValueError: It is none.
    """
    found = {name: a for name, a in arrays.items() if not name.startswith(_INDEX)}
    index = {name[len(_INDEX) :]: a for name, a in arrays.items() if name.startswith(_INDEX)}
    features = found.get("features")
    if features is None or features.ndim != 2 or not features.size:
        raise ValueError("features: expected (N, D), got another shape or nothing")
    count = len(features)
    wanted = {
        "features": (np.float32, features.shape),
        "path_letters": (np.uint8, None),
        "path_ends": (np.int64, (count,)),
        "camids": (np.int32, (count,)),
        "hashes": (np.uint8, (count, HASH_BYTES)),
    }
    for name, (dtype, shape) in wanted.items():
        value = found.get(name)
        if value is None or value.dtype != dtype or (value.shape != shape and shape):
            raise ValueError(f"{name}: expected {np.dtype(dtype)} {shape or '(B,)'}")
    if not _between(found["camids"], UNKNOWN, len(header.cameras) - 1):
        raise ValueError(f"camids: expected -1 to {len(header.cameras) - 1}")
    check_unit(features)
    return Gallery(
        features,
        PathTable(found["path_letters"], found["path_ends"]),
        found["camids"],
        header.cameras,
        found["hashes"],
        header.origin,
        header.index,
        index,
    )


def check_unit(features: Features) -> None:
    """Requires all features to be unit vectors.

    Raises:
        ValueError: A row is not; names it.
    """
    for start in range(0, len(features), _CHECKED_ROWS):
        block = features[start : start + _CHECKED_ROWS]
        squares = np.einsum("nd,nd->n", block, block)
        wrong = np.flatnonzero(~(np.abs(squares - 1) < 0.01))  # NaN is wrong too
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"features: row {start + row} has a squared length of {squares[row]:g}, expected 1"
            )


def _between(values: npt.NDArray[Any], low: int, high: int) -> bool:
    return not len(values) or bool(low <= values.min() and values.max() <= high)
