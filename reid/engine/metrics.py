"""A run's numbers and pictures: metrics.json and TensorBoard.

Every write is checked at once, so that a full disk ends the run with an error that names the file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from reid import distributed
from reid.files import (
    MOST_TEXT,
    OutputError,
    open_to_append,
    read_bytes,
    write_text,
    writing,
)

logger = logging.getLogger(__name__)

PICTURES = "pictures"
"""The subfolder of a run for pictures that `tools/visualize.py` draws later, for TensorBoard."""


class _EventFile:
    """Writes numbers and pictures for TensorBoard, in the calling thread.

    TensorBoard's `SummaryWriter` writes in a second thread, so the caller would not learn that the
    disk is full.

    Args:
        folder: The file is created here.
        purge_step: TensorBoard ignores everything from this step on in older files of the folder.

    Raises:
        OutputError: The file cannot be written. All methods raise it too.
    """

    _made = itertools.count()

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(self._made)}"
        self._path = folder / f"events.out.tfevents.{name}"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("xb")
        self._records = RecordWriter(self._file)
        try:
            self._add(Event(file_version="brain.Event:2"))
            if purge_step is not None:
                self._add(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)
        except OutputError:
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def add_numbers(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        """Adds numbers; TensorBoard shows them as `kind`/name."""
        for name, number in numbers.items():
            scalar = summary.scalar(f"{kind}/{name}", number)  # type: ignore[no-untyped-call]
            self._add(Event(summary=scalar), step)

    def add_picture(self, name: str, path: Path, step: int) -> None:
        """Adds a picture file."""
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        image = summary.image(name, pixels, dataformats="HWC")  # type: ignore[no-untyped-call]
        self._add(Event(summary=image), step)

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._file.close()

    def _add(self, event: Any, step: int = 0) -> None:
        event.wall_time, event.step = time.time(), step
        with writing(self._path):
            self._records.write(event.SerializeToString())
            self._file.flush()


class MetricWriter:
    """Writes the numbers of a run to metrics.json (one JSON object per line) and TensorBoard.

    Before `start`, no file is touched.

    Args:
        output_dir: Folder of the run.
    """

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / "metrics.json"
        self._board: _EventFile | None = None

    def start(self, epoch: int = 0, step: int = 0) -> None:
        """Opens the files, on the main process.

        Args:
            epoch: Finished epochs of the run that is resumed. Lines written after them are removed,
                because the run will write them again; 0 = all lines are removed.
            step: Steps in these epochs.

        Raises:
            OutputError: A file cannot be written.
        """
        if distributed.is_main():
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._keep_until(epoch)
            self._board = _EventFile(self._path.parent, purge_step=step)
            for line in kept:
                if line.step == step:  # `purge_step` makes TensorBoard drop this line too
                    self._board.add_numbers(line.kind, line.numbers, step)

    def write(self, kind: str, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """Appends one line; `kind` says what the numbers are about: train, labels or test.

        Raises:
            OutputError: The line cannot be written.
        """
        if self._board is None:
            return
        with writing(self._path), open_to_append(self._path) as file:
            file.write(_Line(kind, step, epoch, numbers).text())
        self._board.add_numbers(kind, numbers, step)

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Shows a picture in TensorBoard.

        Raises:
            OutputError: The picture cannot be written.
        """
        if self._board is not None:
            self._board.add_picture(name, path, step)

    def close(self) -> None:
        """Closes TensorBoard's file.

        Raises:
            OutputError: The file cannot be written.
        """
        if self._board is not None:
            self._board.close()

    def _keep_until(self, epoch: int) -> list[_Line]:
        """Removes lines from `epoch` on and lines that are not metrics; returns the rest."""
        with writing(self._path):
            if epoch == 0:
                self._path.unlink(missing_ok=True)
            if not self._path.exists():
                return []
        kept = [line for line in _read_lines(self._path) if line.epoch < epoch]
        write_text(self._path, "".join(line.text() for line in kept))
        return kept


@dataclass(frozen=True)
class _Line:
    """A line of metrics.json."""

    kind: str
    step: int
    epoch: int
    numbers: Mapping[str, float]

    def text(self) -> str:
        place = {"kind": self.kind, "step": self.step, "epoch": self.epoch}
        return json.dumps({**place, **self.numbers}) + "\n"

    @classmethod
    def parse(cls, text: str) -> _Line:
        """Reads a line of metrics.json.

        Raises:
            ValueError: The text is not a line of metrics.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        try:
            kind, step, epoch = (content.pop(key) for key in ("kind", "step", "epoch"))
        except KeyError as error:
            raise ValueError(f"lacks {error}") from error
        whole = all(type(number) is int and 0 <= number < 2**63 for number in (step, epoch))
        plain = all(
            type(number) is float or (type(number) is int and abs(number) < 2**63)
            for number in content.values()
        )
        if not (isinstance(kind, str) and whole and plain):
            raise ValueError("expected numbers as values")
        return cls(kind, step, epoch, content)


def show_picture(run: Path, path: Path) -> None:
    """Shows a picture in the TensorBoard of a run, at the step that the run has reached.

    Such pictures go to a subfolder: TensorBoard follows only the newest file of a folder, and the
    run may still be writing to that one.

    Args:
        run: Folder of the run.
        path: The picture.

    Raises:
        OutputError: The picture cannot be written.
    """
    metrics = run / "metrics.json"
    steps = [line.step for line in _read_lines(metrics)] if metrics.exists() else []
    board = _EventFile(run / PICTURES)
    board.add_picture(f"{PICTURES}/{path.stem}", path, max(steps, default=0))
    board.close()


def _read_lines(path: Path) -> list[_Line]:
    """The lines of metrics.json; a warning names lines that are not metrics, which are dropped.

    Raises:
        InputError: The path is not a regular file, or the file is too large.
    """
    lines: list[_Line] = []
    dropped: list[str] = []
    # A power cut may leave bytes that are not text.
    content = read_bytes(path, MOST_TEXT, "text").decode("utf-8", "replace")
    for number, text in enumerate(content.splitlines(), 1):
        try:
            lines.append(_Line.parse(text))
        except (ValueError, RecursionError) as error:
            dropped.append(f"line {number} ({error})")
    if dropped:
        text = f"{dropped[0]} and {len(dropped) - 1:,} more" if dropped[1:] else dropped[0]
        logger.warning("%s: dropped lines that are not metrics: %s", path, text)
    return lines
