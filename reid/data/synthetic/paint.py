"""Colours, shapes and random choices that persons, scenes and cameras have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import ImageDraw

Colour = tuple[int, int, int]
Range = tuple[float, float]
Point = tuple[float, float]
T = TypeVar("T")

CLOTHES: tuple[Colour, ...] = (
    # Dark and neutral colours come twice, as in a street, so that many persons share them.
    *((28, 28, 32), (120, 122, 126), (232, 232, 228), (34, 44, 88)) * 2,
    *((62, 92, 150), (178, 40, 44), (46, 112, 70), (226, 190, 60), (126, 72, 46), (196, 176, 140)),
    *((214, 116, 48), (112, 60, 128), (222, 140, 168), (110, 180, 204)),
)
"""Colours of clothes, and of things in a scene, so that colour alone does not show a person."""


def between(rng: np.random.Generator, bounds: Range) -> float:
    """A number between the bounds, all equally likely."""
    return bounds[0] + (bounds[1] - bounds[0]) * float(rng.random())


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of the values, all equally likely."""
    return values[int(rng.integers(len(values)))]


def near(rng: np.random.Generator, colour: Colour, spread: int = 10) -> Colour:
    """A colour that differs from the given one by at most `spread` grey levels a channel."""
    red, green, blue = (int(rng.integers(-spread, spread + 1)) + part for part in colour)
    return tint((red, green, blue), 1.0)


def tint(colour: Colour, factor: float) -> Colour:
    """The colour, darker (below 1) or brighter; channels are cut to [0, 255]."""
    red, green, blue = (min(max(int(part * factor), 0), 255) for part in colour)
    return red, green, blue


def disc(
    canvas: ImageDraw.ImageDraw, x: float, y: float, wide: float, high: float, fill: Colour | int
) -> None:
    """Draws an ellipse around (x, y) with these two half axes, in pixels."""
    canvas.ellipse((x - wide, y - high, x + wide, y + high), fill=fill)
