"""Signals, Ctrl-C and a time limit end a run early, at a moment when nothing is lost."""

from __future__ import annotations

import math
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
from reid.checking import ConfigError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""SIGHUP: the terminal has closed; a run under `nohup` ignores it. SIGUSR1: Slurm can send it
shortly before a job's time is up."""
_SAME_SIGNAL_S = 1.0
"""Ctrl-C can arrive twice: from the terminal, and passed on by a launcher such as torchrun."""
_LONGEST_STOP_S = 25.0
"""torchrun waits 30 s for its processes before it kills them."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run.

    Args:
        signum: The signal's number.
        message: What happened to the run and how to continue it.

    Attributes:
        exit_code: The code that shells expect after a signal: 143 for SIGTERM, 130 for SIGINT,
            129 for SIGHUP, 138 for SIGUSR1.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message or f"{signal.Signals(signum).name} has ended the run")
        self.signum = signum
        self.exit_code = 128 + signum


class TimeIsUp(Exception):  # noqa: N818  (no error: the user asked for it)
    """The time given to a run, or to several, is over; the same command goes on later.

    Attributes:
        exit_code: 3, so that a script can tell it from success (0) and failure (1 and 2).
    """

    exit_code = 3


def deadline_after(hours: float) -> float:
    """The end of a time limit that begins now, in seconds of `time.monotonic`.

    Raises:
        ConfigError: The limit is not a positive number.
    """
    if not hours > 0:
        raise ConfigError(f"hours: expected more than 0, got {hours:g}")
    return time.monotonic() + 3600 * hours


class StopSignals:
    """Within the block, SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 raise `Interrupted`.

    They raise it at once, or at the end of a `delayed` block if one is open. If another signal
    comes a second or more after the first, the process ends at once. In other threads than the
    main one this does nothing, because Python handles signals only there.

    Attributes:
        signum: The signal that came; 0: none yet.
        deadline: After this time of `time.monotonic`, the run ends with its next whole epoch.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.deadline = math.inf
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
        """Within this block, signals do not interrupt.

        Raises:
            Interrupted: At its end, if a signal came and no other `delayed` block is open.
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
        """Whether a signal has come; waits up to `within_s` seconds for one."""
        deadline = time.monotonic() + within_s
        while not self.signum and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(self.signum)

    def check_time(self) -> None:
        """Raises if the deadline has passed, in this process or in another one.

        Raises:
            TimeIsUp: It has.
        """
        if distributed.largest(int(time.monotonic() >= self.deadline))[0]:
            raise TimeIsUp("the time is over")

    def stop(self, signum: int) -> None:
        """Ends the run after this process or another one received a signal.

        Raises:
            Interrupted: Always, even if `delayed` blocks are open.
        """
        self.signum = signum
        raise Interrupted(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data loader's worker: the training process tells it when to stop
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
    """The command that resumes the run; `arguments` is the `sys.argv` that started it."""
    script, *options = arguments
    options = [option for option in options if option not in ("--resume", "--overwrite")]
    return same_command([script, "--resume", *options])


def same_command(arguments: Sequence[str]) -> str:
    """The command that started this program with the `sys.argv` given, for a shell."""
    script, *options = arguments
    installed = script.startswith("reid ")  # the command of that name
    program = [] if installed else [Path(sys.executable).name]
    words = script.split() if installed else [script]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        words = ["-m", *words] if installed else words
        program = ["torchrun", "--nproc-per-node", str(distributed.local_world_size())]
        nodes = int(os.environ["WORLD_SIZE"]) // distributed.local_world_size()
        if nodes > 1:
            program += ["--nnodes", str(nodes)]
    return shlex.join([*program, *words, *options])
