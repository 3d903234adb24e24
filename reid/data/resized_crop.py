"""A random part of the image, stretched to its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np

from reid.data.resize import Interpolation, Pixels, resize
from reid.data.transforms import PixelTransform
from reid.registry import TRANSFORM, Range

_Number = Annotated[float, Range(0, 1000, above=True)]
_TRIES = 10


@TRANSFORM.register()
class RandomResizedCrop(PixelTransform):
    """A rectangle of the image is stretched to the image's size.

    Its area and its height divided by its width are drawn evenly until it fits into the image, up
    to 10 times; then it is placed evenly. If none fits, the image stays as it is.

    Args:
        area: Smallest and largest share of the image.
        aspect: Smallest and largest height / width, in pixels of the network's input.
        interpolation: How it is stretched.
        prob: Probability that an image is changed.

    Raises:
        ValueError: The probability is not in [0, 1], a range is not ascending or not above 0, or
            the area is above 1.
    """

    def __init__(
        self,
        area: tuple[_Number, _Number] = (0.64, 1.0),
        aspect: tuple[_Number, _Number] = (2.0, 3.0),
        interpolation: Interpolation = "bilinear",
        prob: Annotated[float, Range(0, 1)] = 1.0,
    ) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f"prob: expected a probability from 0 to 1, got {prob}")
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"area: expected ascending shares up to 1, got {area}")
        if not 0 < aspect[0] <= aspect[1]:
            raise ValueError(f"aspect: expected ascending numbers above 0, got {aspect}")
        self._area = area
        self._aspect = aspect
        self._interpolation: Interpolation = interpolation
        self._prob = prob

    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """Pixels of the same size."""
        full_height, full_width = pixels.shape[:2]
        if self._prob < 1 and rng.random() >= self._prob:
            return pixels
        for _ in range(_TRIES):
            area = rng.uniform(*self._area) * full_height * full_width
            aspect = rng.uniform(*self._aspect)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height <= full_height and 0 < width <= full_width:
                top = int(rng.integers(full_height - height + 1))
                left = int(rng.integers(full_width - width + 1))
                part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
                return resize(part, (full_height, full_width), self._interpolation)
        return pixels
