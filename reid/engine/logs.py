"""Where a run's words and numbers go: console, log.txt, metrics.json, TensorBoard.

All four stand in this file, since they agree on what is written once and what a full disk does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch
from tabulate import tabulate
from termcolor import colored
from tqdm import tqdm

from reid import distributed
from reid.engine.progress import ProgressLines
from reid.files import (
    escape_output,
    open_to_append,
    printable,
    writing,
)
from reid.structures import ProgressBar

logger = logging.getLogger(__name__)


class _Console(logging.Handler):
    """Writes to the console without breaking open progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _Formatter(logging.Formatter):
    """Time (if wanted), level (from warnings on) and message.

    Control characters in the message, such as in a file's name, are escaped: a terminal would obey
    them.
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
    """Reports a write error once; `logging` would report it for each line."""

    _told = False

    def _open(self) -> TextIO:  # type: ignore[override]  # a TextIOWrapper is one
        return open_to_append(Path(self.baseFilename), self.errors or "strict")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self._told:
            self._told = True
            sys.stderr.write(f"{self.baseFilename}: cannot be written ({sys.exc_info()[1]})\n")


@contextmanager
def run_logging(output_dir: Path, name: str = "log.txt") -> Iterator[None]:
    """Sends the project's log messages to the console and to `output_dir`/`name`.

    Only the main process writes the file; other processes show only warnings and errors.

    Raises:
        OutputError: The folder or the file cannot be created.
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
            # Whoever catches the error tells the user on the console; the file needs it too.
            logger.removeHandler(console)
            logger.error("stopped by %s: %s", type(error).__name__, error)
            raise


@contextmanager
def tool_logging() -> Iterator[None]:
    """Sends the project's log messages to the console, without times; for tools without a run."""
    with _sent_to([_make_console(times=False)], logging.INFO):
        yield


def _make_console(times: bool = True) -> logging.Handler:
    escape_output()
    console = _Console()
    console.setFormatter(_Formatter(colour=sys.stdout.isatty(), times=times))
    return console


@contextmanager
def _sent_to(handlers: Sequence[logging.Handler], level: int) -> Iterator[logging.Logger]:
    """Lets the project's logger write only to `handlers`, and closes them at the end."""
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
            with contextlib.suppress(OSError):  # a full disk: the run's error already says so
                handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]


def environment(device: torch.device) -> str:
    """A table of versions, device, processes and threads."""
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
    """Shows the progress of a job; yields a function that takes (done, total).

    A terminal shows a bar with an ETA. A redirected console gets lines in the log instead, but not
    for jobs of a few seconds (`ProgressLines`). A job that fails logs no last line.
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
