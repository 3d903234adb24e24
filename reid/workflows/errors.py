"""Errors that the user of a tool can fix: tools print one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

from reid.engine.testing import EvaluationError
from reid.files import InputError, OutputError, printable
from reid.labelling import ClusteringError
from reid.modeling.weights import WeightsError
from reid.registry import ConfigError
from reid.structures import DataError

USER_ERRORS: tuple[type[Exception], ...] = (
    ConfigError, DataError, WeightsError, ClusteringError, EvaluationError, FloatingPointError,
    InputError, OutputError,
)  # fmt: skip
"""Errors about settings, files, numbers or the disk; the message says what to do."""


def tell(error: Exception, code: int = 2) -> int:
    """Writes an error to stderr, with control characters escaped; returns the exit code."""
    sys.stderr.write(printable(f"{type(error).__name__}: {error}") + "\n")
    return code


def tells_errors(*more: type[Exception]) -> Callable[[Callable[[], int]], Callable[[], int]]:
    """Decorates a tool's `main`: after one of `USER_ERRORS`, prints a line and exits with 2.

    Args:
        more: Further errors to treat in this way.
    """

    def decorate(main: Callable[[], int]) -> Callable[[], int]:
        @wraps(main)
        def run() -> int:
            try:
                return main()
            except (*USER_ERRORS, *more) as error:
                return tell(error)

        return run

    return decorate
