"""Progress of a long job as lines in the log, for when no terminal can show a bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta

logger = logging.getLogger(__name__)

QUIET = 10.0
"""Seconds before the first line. A shorter job logs nothing."""

PERIOD = 60.0
"""Seconds between two lines."""


class ProgressLines:
    """Logs how far a job is: the first line after ten seconds, then one a minute, one at the end.

    A line can only appear when the job calls this object.

    Args:
        title: The name of the job, e.g. `Extracting`.
        unit: The unit that is counted, e.g. `img`.
        clock: Returns the time in seconds.
    """

    def __init__(self, title: str, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._unit, self._clock = title, unit, clock
        self._started = clock()
        self._next_line = self._started + QUIET
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        """Logs that `done` of `total` units are finished, if a line is due."""
        self._done = done
        now = self._clock()
        if now < self._next_line or done >= total:
            return
        self._next_line = now + PERIOD
        rate = done / (now - self._started)
        left = f", eta {_time((total - done) / rate)}" if rate else ""
        logger.info(
            "%s: %s of %s %s, %s%s",
            self._title,
            f"{done:,}",
            f"{total:,}",
            self._unit,
            self._rate(rate),
            left,
        )

    def finish(self) -> None:
        """Logs how long the job took, unless it was short."""
        seconds = self._clock() - self._started
        if seconds < QUIET:
            return
        if self._done:
            rate = self._rate(self._done / seconds)
            logger.info(
                "%s: %s %s in %s, %s",
                self._title,
                f"{self._done:,}",
                self._unit,
                _time(seconds),
                rate,
            )
        else:
            logger.info("%s: done in %s", self._title, _time(seconds))

    def _rate(self, rate: float) -> str:
        return f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"


def _time(seconds: float) -> str:
    """A duration in the format of the training log, e.g. `0:01:05`."""
    return str(timedelta(seconds=round(seconds)))
