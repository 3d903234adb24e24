"""Catches what decoders complain of while they still read a picture.

libjpeg writes to standard error and Pillow warns; neither names the file. Several threads and
processes read pictures, so each complaint must be matched to its picture.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
_MOST_HEARD = 2000  # bytes of complaints about one picture


def listen(decode: Callable[[], Result]) -> tuple[Result, str]:
    """The result of `decode`, and what the decoder wrote to standard error or warned of.

    If several threads decode at once and a decoder writes, all that may have written decode again,
    one by one. Only broken pictures cost this time.
    """
    result, heard, others = _listener.run(decode, alone=False)
    if heard and others:
        result, heard, _ = _listener.run(decode, alone=True)
    return result, " ".join(heard.split())


class _Listener:
    """Redirects standard error and Python's warnings while any thread decodes."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._reset()

    def _reset(self) -> None:
        self._active = 0
        self._together = False  # whether several have been active since the last pause
        self._alone = False
        self._warned: dict[int, list[str]] = {}
        self._error: int | None = None  # the real standard error
        self._aside: Any = None  # the unnamed file that replaces it meanwhile

    def run(self, decode: Callable[[], Result], alone: bool) -> tuple[Result, str, bool]:
        """The result, the complaints, and whether they may be another thread's."""
        start, heard, others = self._begin(alone), "", False
        try:
            result = decode()
        finally:
            heard, others = self._end(start, alone)
        return result, heard, others

    def _begin(self, alone: bool) -> int:
        with self._turn:
            self._turn.wait_for(lambda: not self._alone and not (alone and self._active))
            if not self._active:
                self._together = False
                self._turn_aside()
            self._active += 1
            self._together = self._together or self._active > 1
            self._alone = alone
            self._warned[threading.get_ident()] = []
            return self._position()

    def _end(self, start: int, alone: bool) -> tuple[str, bool]:
        with self._turn:
            text = b""
            if self._aside is not None and self._position() > start:
                text = os.pread(self._aside.fileno(), _MOST_HEARD, start)
            if b"\r" in text and self._error is not None:  # a progress bar of another thread
                os.write(self._error, text)
                text = b""
            warned = self._warned.pop(threading.get_ident())
            self._active -= 1
            if not self._active:
                self._turn_back()
            if alone:
                self._alone = False
            self._turn.notify_all()
            # Warnings are caught by thread; C code's text may come from another thread.
            others = self._together and bool(text)
            return "; ".join([*warned, *text.decode("utf-8", "replace").splitlines()]), others

    def _position(self) -> int:
        return 0 if self._aside is None else os.lseek(self._aside.fileno(), 0, os.SEEK_CUR)

    def _turn_aside(self) -> None:
        _watch_warnings()
        try:
            self._error = os.dup(2)
        except OSError:  # it is closed
            return
        if self._aside is None:
            self._aside = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        os.lseek(self._aside.fileno(), 0, os.SEEK_SET)
        os.ftruncate(self._aside.fileno(), 0)
        os.dup2(self._aside.fileno(), 2)

    def _turn_back(self) -> None:
        if self._error is not None:
            os.dup2(self._error, 2)
            os.close(self._error)
            self._error = None

    def hear(self, message: str) -> bool:
        """Records a warning if this thread is decoding; returns whether it is."""
        warned = self._warned.get(threading.get_ident())
        if warned is not None:
            warned.append(message)
        return warned is not None

    def before_fork(self) -> None:
        """Holds the lock during a fork, so that no thread is redirecting meanwhile."""
        self._turn.acquire()

    def after_fork(self) -> None:
        """Releases the lock in the parent."""
        self._turn.release()

    def after_fork_in_child(self) -> None:
        """Resets the child: it has none of the decoding threads, and the file is the parent's."""
        self._turn_back()
        self._turn = threading.Condition()
        aside = self._aside
        self._reset()
        if aside is not None:
            with contextlib.suppress(OSError):
                aside.close()


def _watch_warnings() -> None:
    """Sends all of Pillow's warnings in this process to `_show`.

    `warnings.catch_warnings` is not safe with threads, and forgets which warnings were shown.
    """
    if warnings.showwarning is not _show:
        _shown_by[:] = [warnings.showwarning]
        warnings.showwarning = _show
    if _FILTER not in warnings.filters:
        warnings.filterwarnings("always", module=_PILLOW)


def _show(message: Warning | str, category: Any, filename: str, *more: Any, **options: Any) -> None:
    if not (_PILLOW_FILE in filename and _listener.hear(str(message))):
        _shown_by[0](message, category, filename, *more, **options)


_PILLOW = r"PIL\."
_PILLOW_FILE = f"{os.sep}PIL{os.sep}"
_FILTER = ("always", None, Warning, re.compile(_PILLOW), 0)
_shown_by: list[Callable[..., object]] = []
_listener = _Listener()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_listener.before_fork,
        after_in_parent=_listener.after_fork,
        after_in_child=_listener.after_fork_in_child,
    )
