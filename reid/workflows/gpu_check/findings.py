"""What a section tells: checks, tables and numbers, each as soon as it is known."""

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
    """The time that a section has.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, below 0 once they are over."""
        return self._end - time.monotonic()


class Findings:
    """Sends what a section sees to the process that writes it down.

    Args:
        send: Takes a message that JSON can hold.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send

    def check(self, what: str, right: bool, seen: str) -> None:
        """Something that must hold.

        Args:
            what: Must hold, as a sentence.
            right: Whether it does.
            seen: The numbers.
        """
        self._send({"kind": "check", "what": what, "right": bool(right), "seen": seen})

    def row(self, table: str, /, **cells: Cell) -> None:
        """A row of a table; the table is named by its title, its columns by the cells."""
        row = {name.replace("_", " "): plain(cell) for name, cell in cells.items()}
        self._send({"kind": "row", "table": table, "row": row})

    def number(self, name: str, value: float | str | None) -> None:
        """A number that other sections, the aims or the documentation use."""
        self._send({"kind": "number", "name": name, "value": plain(value)})

    def note(self, text: str) -> None:
        """Something to know when reading the figures."""
        self._send({"kind": "note", "text": text})

    def cut(self, what: str) -> None:
        """Something that was left out, for want of time or of a device."""
        self._send({"kind": "cut", "text": what})


@dataclass(frozen=True)
class Context:
    """What a section is given.

    Attributes:
        device: Where to compute.
        sizes: How large.
        clock: How long.
        found: Tells what is seen.
        numbers: Of earlier sections, by section and name.
        folder: For files of its own; empty at first, removed at the end.
    """

    device: torch.device
    sizes: Sizes
    clock: Clock
    found: Findings
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: str = "."

    def number(self, section: str, name: str) -> float | None:
        """A number of an earlier section, if there is one."""
        value = self.numbers.get(section, {}).get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def enough(self, seconds: float, what: str) -> bool:
        """Whether there is so much time left; if not, it is told what is left out."""
        if self.clock.left() >= seconds:
            return True
        self.found.cut(f"{what}: no time was left")
        return False


def plain(value: Any) -> Any:
    """A cell as JSON holds it: numbers rounded to six digits, NaN and infinity as words.

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
    """A message as a line of text."""
    return json.dumps(message, allow_nan=False) + "\n"
