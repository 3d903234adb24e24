"""The messages of a section: checks, tables and numbers, each sent as soon as it is known."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reid.workflows.gpu_check.sizes import Sizes

if TYPE_CHECKING:
    import torch

Cell = str | float | int | bool | None


class Clock:
    """The remaining time of a section.

    Args:
        seconds: Time from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Remaining seconds; negative when the time is up."""
        return self._end - time.monotonic()


class Findings:
    """Sends the results of a section to the process that writes them to disk.

    Args:
        send: Sends a message that JSON can hold.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send

    def check(self, what: str, right: bool, seen: str) -> None:
        """Reports a check.

        Args:
            what: The statement that must hold, as a sentence.
            right: Whether it holds.
            seen: The numbers behind it.
        """
        self._send({"kind": "check", "what": what, "right": bool(right), "seen": seen})

    def row(self, table: str, /, **cells: Cell) -> None:
        """Adds a row to the table with this title; the names of the cells name the columns."""
        row = {name.replace("_", " "): plain(cell) for name, cell in cells.items()}
        self._send({"kind": "row", "table": table, "row": row})

    def number(self, name: str, value: float | str | None) -> None:
        """Reports a number that other sections, the aims or the documentation use."""
        self._send({"kind": "number", "name": name, "value": plain(value)})

    def note(self, text: str) -> None:
        """Adds a remark for readers of the figures."""
        self._send({"kind": "note", "text": text})

    def cut(self, what: str) -> None:
        """Reports that something was left out, because time or a device was missing."""
        self._send({"kind": "cut", "text": what})


@dataclass(frozen=True)
class Context:
    """The input of a section.

    Attributes:
        device: The device to check.
        sizes: Sizes of all inputs.
        clock: The section's remaining time.
        found: Reports results.
        numbers: Numbers of earlier sections, by section and name.
        folder: A temporary folder; empty at first, removed at the end.
    """

    device: torch.device
    sizes: Sizes
    clock: Clock
    found: Findings
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: str = "."

    def number(self, section: str, name: str) -> float | None:
        """A number of an earlier section; None if it does not exist."""
        value = self.numbers.get(section, {}).get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def enough(self, seconds: float, what: str) -> bool:
        """Whether enough time is left; if not, reports that `what` is left out."""
        if self.clock.left() >= seconds:
            return True
        self.found.cut(f"{what}: no time was left")
        return False


def plain(value: Any) -> Any:
    """A cell for JSON: numbers rounded to six digits, NaN and infinity as text.

    >>> plain(1.23456789), plain(float("nan")), plain(None)
    (1.23457, 'nan', None)
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)


def line(message: Mapping[str, Any]) -> str:
    """A message as one line of text."""
    return json.dumps(message, allow_nan=False) + "\n"
