"""A random part of the image, stretched to its size."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np

from reid.data.maps import Crop
from reid.data.resize import Interpolation
from reid.data.transforms import CropTransform
from reid.registry import TRANSFORM, Range

_Number = Annotated[float, Range(0, 1000, above=True)]
_TRIES = 10


@TRANSFORM.register()
class RandomResizedCrop(CropTransform):
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
        self.interpolation = interpolation
        self._prob = prob

    def draw(self, rng: np.random.Generator, size: tuple[int, int]) -> Crop | None:
        """A random rectangle of an image of `size` (H, W); None: it stays as it is."""
        if self._prob < 1 and rng.random() >= self._prob:
            return None
        for _ in range(_TRIES):
            area = rng.uniform(*self._area) * size[0] * size[1]
            aspect = rng.uniform(*self._aspect)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height <= size[0] and 0 < width <= size[1]:
                top = int(rng.integers(size[0] - height + 1))
                return Crop(top, int(rng.integers(size[1] - width + 1)), height, width)
        return None
