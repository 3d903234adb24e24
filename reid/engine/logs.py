"""Where a run's words and numbers go: console, log.txt, metrics.json, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from termcolor import colored
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from reid import distributed
from reid.engine.progress import ProgressLines
from reid.files import escape_output, write_text, writing
from reid.structures import ProgressBar

PICTURES = "pictures"
"""Folder below a run's with pictures that were drawn of it later, for TensorBoard."""


class _Console(logging.Handler):
    """Writes past open progress bars; colours levels on a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _Formatter(logging.Formatter):
    """The message, from warnings on with their level, and the time unless it is left out."""

    def __init__(self, colour: bool, times: bool = True) -> None:
        super().__init__(("%(asctime)s  " if times else "") + "%(message)s", "%m-%d %H:%M:%S")
        self._colour = colour

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        if record.levelno >= logging.WARNING:
            level = record.levelname
            if self._colour:
                level = colored(level, "red" if record.levelno >= logging.ERROR else "yellow")
            record.message = f"{level}: {record.message}"
        return super().formatMessage(record)


class _LogFile(logging.FileHandler):
    """Says once that it cannot be written, where logging would say so for each line."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self._told:
            self._told = True
            sys.stderr.write(f"{self.baseFilename}: cannot be written ({sys.exc_info()[1]})\n")


@contextmanager
def run_logging(output_dir: Path) -> Iterator[None]:
    """Sends what `logging` gets from the project to the console and to `output_dir`/log.txt.

    Only the main process writes; the others show warnings alone.

    Raises:
        OutputError: The folder or log.txt cannot be made.
    """
    console = _make_console()
    handlers = [console]
    if distributed.is_main():
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            path = output_dir / "log.txt"
            handlers.append(_LogFile(path, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].setFormatter(_Formatter(colour=False))
    with _sent_to(handlers, logging.INFO if distributed.is_main() else logging.WARNING) as logger:
        try:
            yield
        except BaseException as error:
            # whoever catches it tells the user; log.txt must know too
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
    with tqdm(desc=title, unit=unit, leave=False, disable=not bar_shown) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if lines is not None:
                lines(done, total)

        yield show
    if lines is not None:
        lines.finish()


class MetricWriter:
    """Numbers of a run, to metrics.json (one JSON object a line) and TensorBoard.

    Nothing is touched before `start`.

    Args:
        output_dir: Folder of the run.
    """

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / "metrics.json"
        self._board: SummaryWriter | None = None

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
                self._board = SummaryWriter(str(self._path.parent), purge_step=step)
                for line in kept:
                    if line["step"] == step:  # TensorBoard drops it with what comes again
                        self._show(**line)

    def write(self, kind: str, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """Appends one line; `kind` says what the numbers are about: train, labels, test.

        Raises:
            OutputError: It cannot be written.
        """
        if self._board is None:
            return
        line: dict[str, Any] = {"kind": kind, "step": step, "epoch": epoch, **numbers}
        with writing(self._path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._show(**line)

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Shows a picture in TensorBoard."""
        if self._board is not None:
            _add_image(self._board, name, path, step)

    def close(self) -> None:
        """Writes what TensorBoard still holds back.

        Raises:
            OutputError: It cannot be written.
        """
        if self._board is not None:
            with writing(self._path.parent):
                self._board.close()

    def _show(self, kind: str, step: int, epoch: int, **numbers: float) -> None:
        assert self._board is not None
        for name, number in numbers.items():
            self._board.add_scalar(f"{kind}/{name}", number, step)

    def _keep_until(self, epoch: int) -> list[dict[str, Any]]:
        """Drops the lines from `epoch` on, and a last line that was cut off; gives the others."""
        if epoch == 0:
            self._path.unlink(missing_ok=True)
        if not self._path.exists():
            return []
        kept = [line for line in _read_lines(self._path) if line["epoch"] < epoch]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept


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
    folder, metrics = run / PICTURES, run / "metrics.json"
    steps = [line["step"] for line in _read_lines(metrics)] if metrics.is_file() else []
    with writing(folder), SummaryWriter(str(folder)) as board:
        _add_image(board, f"{PICTURES}/{path.stem}", path, max(steps, default=0))


def _add_image(board: SummaryWriter, name: str, path: Path, step: int) -> None:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    board.add_image(name, pixels, step, dataformats="HWC")


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.json, without one that was cut off."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
