"""How a run ends early: a signal or Ctrl-C, at a moment that loses nothing."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from reid import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGHUP: the terminal is gone; `nohup` ignores it, and so do we then. SIGUSR1: what Slurm sends
before the end of a job's time."""
_SAME_SIGNAL_S = 1.0
"""A launcher such as torchrun hands on what the terminal has sent to its processes already."""
_LONGEST_STOP_S = 25.0
"""torchrun waits 30 s for its processes before it kills them."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run.

    Args:
        signum: Which.
        message: What it means for the run.

    Attributes:
        exit_code: What a shell expects of a process that a signal has ended: 143 after SIGTERM,
            130 after SIGINT, 129 after SIGHUP, 138 after SIGUSR1.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message or f"{signal.Signals(signum).name} has ended the run")
        self.signum = signum
        self.exit_code = 128 + signum


class StopSignals:
    """While its block runs, SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 raise `Interrupted`.

    At once, but at the end of a `delayed` block where one is open. A second signal, a second or
    more after the first, ends the process at once. Does nothing outside the main thread, where
    Python takes no signals.

    Attributes:
        signum: The signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._depth = 0
        self._came_at = 0.0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """What runs in this block is not interrupted.

        Raises:
            Interrupted: At its end, where a signal came meanwhile and no other such block is open.
        """
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self.check()

    def check(self) -> None:
        """Raises if a signal came; an exception raised inside a destructor is swallowed.

        Raises:
            Interrupted: A signal came, and no `delayed` block is open.
        """
        if self.signum and not self._depth:
            raise Interrupted(self.signum)

    def came(self, within_s: float = 0.0) -> bool:
        """Whether a signal came, or comes within some seconds."""
        deadline = time.monotonic() + within_s
        while not self.signum and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(self.signum)

    def stop(self, signum: int) -> None:
        """Ends the run because of a signal that came to this process or to another.

        Raises:
            Interrupted: Always, though `delayed` blocks are open.
        """
        self.signum = signum
        raise Interrupted(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a process that reads images: the one that started it says when to end
        if self.signum:
            if time.monotonic() - self._came_at >= _SAME_SIGNAL_S:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.signum = signum
        self._came_at = time.monotonic()
        if distributed.is_distributed():
            # Other processes may never reach the collective this one waits in.
            timer = threading.Timer(_LONGEST_STOP_S, os._exit, (128 + signum,))
            timer.daemon = True
            timer.start()
        if not self._depth:
            raise Interrupted(signum)


def resume_command(arguments: Sequence[str]) -> str:
    """The command that goes on with the run that `arguments` (a `sys.argv`) has started."""
    script, *options = arguments
    kept = [option for option in options if option not in ("--resume", "--overwrite")]
    installed = script.startswith("reid ")  # the command of that name
    program = [] if installed else [Path(sys.executable).name]
    words = script.split() if installed else [script]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        words = ["-m", *words] if installed else words
        program = ["torchrun", "--nproc-per-node", str(distributed.local_world_size())]
        nodes = int(os.environ["WORLD_SIZE"]) // distributed.local_world_size()
        if nodes > 1:
            program += ["--nnodes", str(nodes)]
    return shlex.join([*program, *words, "--resume", *kept])
