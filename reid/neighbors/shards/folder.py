"""A folder in which the processes of one machine share arrays and note what is done."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from reid.files import InputError, read_text, replacing, writing

Facts = Mapping[str, float]
_Array = npt.NDArray[Any]


class WorkFolder:
    """Arrays on disk, mapped into memory, and a journal of the finished blocks of each step.

    Every process appends to a journal of its own and reads those of all. A line follows once the
    arrays are on disk, so every complete line is true, whenever a process was killed.

    Args:
        folder: Is there, and is held by this run.
        number: Of this process.

    Attributes:
        path: The folder.
    """

    _JOURNALS = "done"

    def __init__(self, folder: Path, number: int = 0) -> None:
        self.path = folder
        self._number = number
        self._mapped: dict[str, np.memmap[Any, Any]] = {}
        self._done: dict[str, dict[int, Facts]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Reads what all processes have noted."""
        self._done = {}
        for path in sorted((self.path / self._JOURNALS).glob("*.jsonl")):
            for line in read_text(path).splitlines():
                try:
                    step, block, facts = json.loads(line)
                except (ValueError, TypeError):  # half a line of a killed process
                    continue
                self._done.setdefault(step, {})[block] = facts

    def done(self, step: str) -> Mapping[int, Facts]:
        """The blocks of a step that were finished at the last `refresh`, with facts about each."""
        return self._done.get(step, {})

    def note(self, step: str, block: int, facts: Facts | None = None) -> None:
        """Notes that a block of a step is finished, once the mapped arrays are on disk.

        Raises:
            OutputError: The disk is full.
        """
        path = self.path / self._JOURNALS / f"{self._number}.jsonl"
        with writing(path):
            for array in self._mapped.values():
                if array.mode == "r+":
                    array.flush()
            path.parent.mkdir(exist_ok=True)
            with path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    whole = file.read() == b"\n"
                    file.write(b"" if whole else b"\n")
                file.write(json.dumps([step, block, dict(facts or {})]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self._done.setdefault(step, {})[block] = dict(facts or {})

    def make(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        """Makes an array whose place on the disk is reserved.

        Raises:
            OutputError: The disk is too small.
        """
        path = self._file(name)
        with writing(path):
            self._forget(name)
            path.unlink(missing_ok=True)
            if not all(shape):
                np.save(path, np.empty(shape, dtype))
                return
            open_memmap(path, "w+", dtype, shape)
            # A write to a mapped page that finds no place would kill the process.
            if hasattr(os, "posix_fallocate"):  # macOS has none
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def array(self, name: str) -> _Array:
        """An array, mapped into memory; what is written to it is seen by all processes.

        Raises:
            InputError: Somebody else has removed or changed its file.
        """
        if name not in self._mapped:
            path = self._file(name)
            with _reading(path):
                _check_length(path)
                found = np.load(path, mmap_mode="r+", allow_pickle=False)
            if not found.size:
                return np.asarray(found)
            self._mapped[name] = found
        return np.asarray(self._mapped[name])

    def remove(self, *names: str) -> None:
        """Removes arrays and pieces that no later step reads."""
        for name in names:
            self._forget(name)
            with writing(self.path):
                self._file(name).unlink(missing_ok=True)
                shutil.rmtree(self.path / name, ignore_errors=True)

    def write_piece(self, name: str, block: int, *arrays: _Array) -> None:
        """Writes some arrays of a block as a file of its own, whole or not at all."""
        with replacing(self._piece(name, block)) as temporary, temporary.open("wb") as file:
            for array in arrays:
                np.save(file, array)

    def read_piece(self, name: str, block: int) -> Iterator[_Array]:
        """The arrays of such a file.

        Raises:
            InputError: Somebody else has removed or changed the file.
        """
        path = self._piece(name, block)
        with _reading(path), path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            while file.tell() < end:
                yield np.load(file, allow_pickle=False)

    def read_into(self, name: str, block: int, *targets: _Array) -> None:
        """Reads such a file into contiguous arrays of the same shapes and types.

        Raises:
            InputError: Somebody else has removed or changed the file.
        """
        path = self._piece(name, block)
        with _reading(path), path.open("rb") as file:
            for target in targets:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if (shape, dtype) != (target.shape, target.dtype):
                    raise ValueError(
                        f"holds {dtype} {shape}, expected {target.dtype} {target.shape}"
                    )
                view, done = target.data.cast("B"), 0
                while done < len(view):
                    part = file.readinto(view[done:])
                    if not part:
                        raise EOFError("it is cut off")
                    done += part

    def remove_piece(self, name: str, block: int) -> None:
        """Removes a piece, if it is there."""
        with writing(self.path):
            self._piece(name, block).unlink(missing_ok=True)

    def _piece(self, name: str, block: int) -> Path:
        return self.path / name / f"{block:06d}.npy"

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"

    def _forget(self, name: str) -> None:
        self._mapped.pop(name, None)


def _check_length(path: Path) -> None:
    """Refuses an array that was cut off, to which `np.load` would add zeros.

    Raises:
        ValueError: It is.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if os.fstat(file.fileno()).st_size < file.tell() + dtype.itemsize * math.prod(shape):
            raise ValueError("it is cut off")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors about a file that was noted as whole into an `InputError`."""
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot be read ({reason}), but the folder's notes count on it; remove "
            "the folder to start anew"
        ) from error
