"""Where a run's words and numbers go: console, log.txt, metrics.json, TensorBoard.

All four stand in this file, since they agree on what is written once and what a full disk does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from termcolor import colored
from torch.utils.tensorboard import summary
from tqdm import tqdm

from reid import distributed
from reid.engine.progress import ProgressLines
from reid.files import (
    MOST_TEXT,
    OutputError,
    escape_output,
    open_to_append,
    printable,
    read_bytes,
    write_text,
    writing,
)
from reid.structures import ProgressBar

logger = logging.getLogger(__name__)

PICTURES = "pictures"
"""Folder below a run's with pictures that were drawn of it later, for TensorBoard."""


class _Console(logging.Handler):
    """Writes past open progress bars; colours levels on a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _Formatter(logging.Formatter):
    """The message, from warnings on with their level, and the time unless it is left out.

    What a terminal would obey in it, such as in a file's name, is escaped.
    """

    def __init__(self, colour: bool, times: bool = True) -> None:
        super().__init__(("%(asctime)s  " if times else "") + "%(message)s", "%m-%d %H:%M:%S")
        self._colour = colour

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        record.message = printable(record.message)
        if record.levelno >= logging.WARNING:
            colour = "red" if record.levelno >= logging.ERROR else "yellow"
            level = colored(record.levelname, colour) if self._colour else record.levelname
            record.message = f"{level}: {record.message}"
        return super().formatMessage(record)


class _LogFile(logging.FileHandler):
    """Says once that it cannot be written, where logging would say so for each line."""

    _told = False

    def _open(self) -> TextIO:  # type: ignore[override]  # a TextIOWrapper is one
        return open_to_append(Path(self.baseFilename), self.errors or "strict")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self._told:
            self._told = True
            sys.stderr.write(f"{self.baseFilename}: cannot be written ({sys.exc_info()[1]})\n")


@contextmanager
def run_logging(output_dir: Path, name: str = "log.txt") -> Iterator[None]:
    """Sends what `logging` gets from the project to the console and to `output_dir`/`name`.

    Only the main process writes; the others show warnings alone.

    Raises:
        OutputError: The folder or the file cannot be made.
    """
    console = _make_console()
    handlers = [console]
    if distributed.is_main():
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            path = output_dir / name
            handlers.append(_LogFile(path, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].setFormatter(_Formatter(colour=False))
    with _sent_to(handlers, logging.INFO if distributed.is_main() else logging.WARNING) as logger:
        try:
            yield
        except BaseException as error:
            # whoever catches it tells the user; the file must know too
            logger.removeHandler(console)
            logger.error("stopped by %s: %s", type(error).__name__, error)
            raise


@contextmanager
def tool_logging() -> Iterator[None]:
    """Sends what `logging` gets from the project to the console, as it is; for where no run is."""
    with _sent_to([_make_console(times=False)], logging.INFO):
        yield


def _make_console(times: bool = True) -> logging.Handler:
    escape_output()
    console = _Console()
    console.setFormatter(_Formatter(colour=sys.stdout.isatty(), times=times))
    return console


@contextmanager
def _sent_to(handlers: Sequence[logging.Handler], level: int) -> Iterator[logging.Logger]:
    """Has the project's logger send to `handlers` alone, which are closed in the end."""
    logger = logging.getLogger("reid")
    before = logger.level, logger.propagate
    logger.setLevel(level)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield logger
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk; the run's own error tells of it
                handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]


def environment(device: torch.device) -> str:
    """A table of what the run runs on."""
    rows = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, version(name)) for name in ("reid", "torch", "torchvision", "timm", "numpy")),
        ("device", device_name(device)),
        ("processes", f"{distributed.world_size()}"),
        ("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}"),
    ]
    return tabulate(rows, tablefmt="plain")


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda})"
    return str(device)


@contextmanager
def progress_bar(title: str, unit: str = "it") -> Iterator[ProgressBar]:
    """Shows how far a job is; yields a function of (done, total).

    On a terminal a bar with ETA; where the console is redirected, lines in the log, of which a job
    of some seconds has none (`ProgressLines`). A job that fails tells no end.
    """
    bar_shown = distributed.is_main() and sys.stderr.isatty()
    lines = None
    if distributed.is_main() and not (bar_shown and sys.stdout.isatty()):
        lines = ProgressLines(title, unit)
    with tqdm(desc=printable(title), unit=unit, leave=False, disable=not bar_shown) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if lines is not None:
                lines(done, total)

        yield show
    if lines is not None:
        lines.finish()


class _EventFile:
    """TensorBoard's numbers and pictures, written by the thread that has them.

    TensorBoard's own writer has a thread, which alone would see that the disk is full.

    Args:
        folder: Where the file is made.
        purge_step: TensorBoard drops what earlier files of the folder hold from this step on.

    Raises:
        OutputError: It cannot be written; so from all methods.
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
        """Adds numbers, shown under `kind`/name."""
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
        """Ends the file."""
        with writing(self._path):
            self._file.close()

    def _add(self, event: Any, step: int = 0) -> None:
        event.wall_time, event.step = time.time(), step
        with writing(self._path):
            self._records.write(event.SerializeToString())
            self._file.flush()


class MetricWriter:
    """Numbers of a run, to metrics.json (one JSON object a line) and TensorBoard.

    Nothing is touched before `start`.

    Args:
        output_dir: Folder of the run.
    """

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / "metrics.json"
        self._board: _EventFile | None = None

    def start(self, epoch: int = 0, step: int = 0) -> None:
        """Opens the files, on the main process.

        Args:
            epoch: Finished epochs of the run that goes on. What it wrote after the last step of
                them is dropped, since it comes again; 0 = all of it.
            step: Steps in these epochs.

        Raises:
            OutputError: They cannot be written.
        """
        if distributed.is_main():
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._keep_until(epoch)
            self._board = _EventFile(self._path.parent, purge_step=step)
            for line in kept:
                if line.step == step:  # TensorBoard drops it with what comes again
                    self._board.add_numbers(line.kind, line.numbers, step)

    def write(self, kind: str, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """Appends one line; `kind` says what the numbers are about: train, labels, test.

        Raises:
            OutputError: It cannot be written.
        """
        if self._board is None:
            return
        with writing(self._path), open_to_append(self._path) as file:
            file.write(_Line(kind, step, epoch, numbers).text())
        self._board.add_numbers(kind, numbers, step)

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Shows a picture in TensorBoard.

        Raises:
            OutputError: It cannot be written.
        """
        if self._board is not None:
            self._board.add_picture(name, path, step)

    def close(self) -> None:
        """Ends TensorBoard's file.

        Raises:
            OutputError: It cannot be written.
        """
        if self._board is not None:
            self._board.close()

    def _keep_until(self, epoch: int) -> list[_Line]:
        """Drops the lines from `epoch` on, and those that are no metrics; gives the others."""
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
        own = {"kind": self.kind, "step": self.step, "epoch": self.epoch}
        return json.dumps({**own, **self.numbers}) + "\n"

    @classmethod
    def parse(cls, text: str) -> _Line:
        """The line that stands for `text`.

        Raises:
            ValueError: It is none.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        try:
            kind, step, epoch = (content.pop(key) for key in ("kind", "step", "epoch"))
        except KeyError as error:
            raise ValueError(f"has no {error}") from error
        whole = all(type(number) is int and 0 <= number < 2**63 for number in (step, epoch))
        plain = all(
            type(number) is float or (type(number) is int and abs(number) < 2**63)
            for number in content.values()
        )
        if not (isinstance(kind, str) and whole and plain):
            raise ValueError("has values of other types than metrics")
        return cls(kind, step, epoch, content)


def show_picture(run: Path, path: Path) -> None:
    """Shows a picture in the TensorBoard of a run, at the step that the run has reached.

    TensorBoard follows the newest file of a folder alone, which a run may still be writing, so
    that pictures have a folder of their own below the run's.

    Args:
        run: Folder of the run.
        path: The picture.

    Raises:
        OutputError: It cannot be written.
    """
    metrics = run / "metrics.json"
    steps = [line.step for line in _read_lines(metrics)] if metrics.exists() else []
    board = _EventFile(run / PICTURES)
    board.add_picture(f"{PICTURES}/{path.stem}", path, max(steps, default=0))
    board.close()


def _read_lines(path: Path) -> list[_Line]:
    """The lines of metrics.json; those that are none are dropped, with a warning.

    Raises:
        InputError: It is no regular file, or too large.
    """
    lines: list[_Line] = []
    dropped: list[str] = []
    # bytes that are no text are what a power cut leaves
    content = read_bytes(path, MOST_TEXT, "text").decode("utf-8", "replace")
    for number, text in enumerate(content.splitlines(), 1):
        try:
            lines.append(_Line.parse(text))
        except (ValueError, RecursionError) as error:
            dropped.append(f"line {number} ({error})")
    if dropped:
        text = f"{dropped[0]} and {len(dropped) - 1:,} more" if dropped[1:] else dropped[0]
        logger.warning("%s: dropped what is no line of metrics: %s", path, text)
    return lines
