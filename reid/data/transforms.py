"""From a picture's pixels to the model's input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from reid.data.resize import Interpolation, Pixels, resize

FloatImage = npt.NDArray[np.float32]
"""A normalised image (3, H, W)."""


class PixelTransform(ABC):
    """An augmentation of pixels, after the resize and before normalisation."""

    @abstractmethod
    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """Pixels of the same size; the given ones are not written to.

        Args:
            pixels: (H, W, 3).
            rng: Of all that is drawn.
            other: Gives the pixels (H, W, 3) of another training image, drawn with `rng`, as they
                are after the resize.
        """


class NormalizedTransform(ABC):
    """An augmentation of the normalised image."""

    @abstractmethod
    def __call__(self, image: FloatImage, rng: np.random.Generator) -> None:
        """Changes the image (3, H, W) in place; all that is drawn comes from `rng`."""


class ImageTransform:
    """What makes the model's input of a picture's pixels.

    Args:
        size: (H, W) of the input.
        mean: Per channel, for values in [0, 1].
        std: Per channel, for values in [0, 1].
        steps: Augmentations in their order; those on pixels come first.
        interpolation: Of the resize.

    Attributes:
        size: (H, W) of the input.
        interpolation: Of the resize.

    Raises:
        ValueError: A step on pixels stands behind one on the normalised image.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        steps: Sequence[PixelTransform | NormalizedTransform] = (),
        *,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self.size = size
        self.interpolation: Interpolation = interpolation
        self._on_pixels = [step for step in steps if isinstance(step, PixelTransform)]
        self._on_normalized = [step for step in steps if isinstance(step, NormalizedTransform)]
        if [*self._on_pixels, *self._on_normalized] != [*steps]:
            raise ValueError(
                "transforms: expected those on pixels before those on the normalised image "
                f"({', '.join(type(step).__name__ for step in self._on_normalized)}), got "
                f"{', '.join(type(step).__name__ for step in steps)}"
            )
        levels = torch.arange(256, dtype=torch.float32) / 255
        table = (levels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
        self._table: FloatImage = table.numpy()
        # Compiled here, before there are workers, which would each do it.
        black = self.resize(np.zeros((1, 1, 3), np.uint8))
        _normalize(black, self._table, np.empty((3, *size), np.float32))

    def resize(self, pixels: Pixels) -> Pixels:
        """Pixels (height, width, 3) at the input's size, (H, W, 3)."""
        return resize(pixels, self.size, self.interpolation)

    def finish(
        self,
        pixels: Pixels,
        out: FloatImage,
        rng: np.random.Generator,
        other: Callable[[], Pixels],
    ) -> None:
        """Writes the input that is made of resized pixels.

        Args:
            pixels: (H, W, 3), not written to.
            out: (3, H, W).
            rng: See `PixelTransform`.
            other: See `PixelTransform`.
        """
        for change in self._on_pixels:
            pixels = change(pixels, rng, other)
        _normalize(pixels, self._table, out)
        for erase in self._on_normalized:
            erase(out, rng)


@njit(cache=True)
def _normalize(pixels: Pixels, table: FloatImage, out: FloatImage) -> None:
    """Looks each grey level up in the table (3, 256) of normalised values."""
    height, width, _ = pixels.shape
    for y in range(height):
        for x in range(width):
            out[0, y, x] = table[0, pixels[y, x, 0]]
            out[1, y, x] = table[1, pixels[y, x, 1]]
            out[2, y, x] = table[2, pixels[y, x, 2]]
