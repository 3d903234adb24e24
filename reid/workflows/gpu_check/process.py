"""Processes that work for the runner; ending one also ends all of its children."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reid.workflows.gpu_check.findings import line

_LOG_LINES = 12
_KILL_S = 5.0


class OutOfTimeError(Exception):
    """A process has not answered in time."""


class DiedError(Exception):
    """A process ended instead of answering; the message has its exit code and last output."""


class Background:
    """Runs a module of this package in a new process group.

    Args:
        module: The module's name in this package.
        log: Receives the output of the process and its children.
        arguments: Arguments of the module.
        handles: File descriptors that the process inherits.
        environment: Environment variables in addition to those of this process.
        nice: Run at low priority.
    """

    def __init__(
        self,
        module: str,
        log: Path,
        arguments: tuple[str, ...] = (),
        *,
        handles: tuple[int, ...] = (),
        environment: Mapping[str, str] | None = None,
        nice: bool = False,
    ) -> None:
        before = shutil.which("nice") if nice else None
        # The child must be able to import everything that this process can.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*([before, "-n", "10"] if before else []),
                 sys.executable, "-m", f"{__package__}.{module}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=handles,
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
                start_new_session=True,
            )  # fmt: skip

    def end(self) -> None:
        """Ends it and all that it has started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.code()

    def code(self) -> int | None:
        """Its exit code, waited for a moment; None if it does not end.

        A process that waits for a driver may not even heed SIGKILL.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_KILL_S)
        return self._process.returncode


class Worker(Background):
    """A process that runs sections; see `worker`.

    Args:
        log: Receives the output of the process and its children.
        environment: Environment variables in addition to those of this process.
    """

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._log = log
        handles = orders, answers
        super().__init__(
            "worker", log, (str(orders), str(answers)), handles=handles, environment=environment
        )
        for handle in handles:
            os.close(handle)
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # A process that is killed may leave half a line.
        with os.fdopen(self._answers) as answers, contextlib.suppress(ValueError):
            for text in answers:
                self._messages.put(json.loads(text))
        self._messages.put(None)

    def ask(self, order: Mapping[str, Any]) -> None:
        """Sends a line to the process.

        Raises:
            DiedError: The process has ended.
        """
        try:
            os.write(self._orders, line(order).encode())
        except OSError as error:
            raise DiedError(self._last_words()) from error

    def next_message(self, seconds: float) -> dict[str, Any]:
        """Waits for the next message of the process.

        Raises:
            OutOfTimeError: No message came in time.
            DiedError: The process has ended.
        """
        try:
            message = self._messages.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise OutOfTimeError from None
        if message is None:
            raise DiedError(self._last_words())
        return message

    def end(self) -> None:
        """Ends it and all that it has started, at once."""
        super().end()
        with contextlib.suppress(OSError):
            os.close(self._orders)

    def _last_words(self) -> str:
        code = self.code()
        lines = self._log.read_text("utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join((f"the process ended with code {code}", *lines))
