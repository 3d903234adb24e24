"""The aims for speed, and the comparison with the measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Aim(NamedTuple):
    """An aim for a number.

    Attributes:
        what: The aim in words.
        value: The limit.
        most: Whether the number must be at most the limit; otherwise at least.
        percent: Whether the number is a share.
        numbers: Sections and names of the numbers that count; the best one is compared.
    """

    what: str
    value: float
    most: bool
    percent: bool
    numbers: tuple[tuple[str, str], ...]


AIMS = (
    Aim(
        "model FLOP utilisation of a training step at batch 256, of the matrix product measured "
        "in the same run",
        0.40, False, True,
        (("training", "utilisation_large"), ("modes", "utilisation_large")),
    ),
    Aim(
        "times as fast as the plain step, at batch 32 in fp16",
        5.0, False, False, (("plain_step", "ratio_small"),),
    ),
    Aim(
        "share of the losses in a training step at batch 32",
        0.10, True, True, (("stages", "loss_share_small"),),
    ),
)  # fmt: skip


def aims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compares each aim with the results; aims without measurements, or at toy sizes, are missing.

    Args:
        results: The content of the JSON file.
    """
    if results["sizes"] != "full":
        return []
    numbers = {found["name"]: found["numbers"] for found in results["sections"]}
    told = []
    for aim in AIMS:
        values = [numbers.get(section, {}).get(name) for section, name in aim.numbers]
        measured = [value for value in values if isinstance(value, (int, float))]
        if measured:
            best = min(measured) if aim.most else max(measured)
            reached = best <= aim.value if aim.most else best >= aim.value
            told.append(
                {"what": aim.what, "aim": _text(aim, aim.value), "seen": _text(aim, best),
                 "reached": reached}
            )  # fmt: skip
    return told


def _text(aim: Aim, value: float) -> str:
    bound = ("at most " if aim.most else "at least ") if value == aim.value else ""
    return bound + (f"{value:.1%}" if aim.percent else f"{value:.2g}x")
