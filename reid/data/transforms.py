"""From a picture's pixels to the model's input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from reid.data.images import Decoding, read_image
from reid.data.maps import Crop, Geometry, ImageMap, Move
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
            rng: The source of all random numbers.
            other: Gives the resized pixels (H, W, 3) of another training image, chosen with `rng`.
        """


_STILL = Move()


class MoveTransform(PixelTransform):
    """An augmentation that only moves pixels; `ImageTransform` does this while it normalises."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Move:
        """The move of an image; all random numbers come from `rng`."""

    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """The moved pixels."""
        return _moved(pixels, self.draw(rng))


class CropTransform(PixelTransform):
    """An augmentation that stretches a part of the image to the image's size."""

    interpolation: Interpolation = "bilinear"

    @abstractmethod
    def draw(self, rng: np.random.Generator, size: tuple[int, int]) -> Crop | None:
        """The part of an image of `size` (H, W); all random numbers come from `rng`.

        None: the image stays as it is.
        """

    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """The stretched part, or the same pixels."""
        return self.stretch(pixels, self.draw(rng, (pixels.shape[0], pixels.shape[1])))

    def stretch(self, pixels: Pixels, crop: Crop | None) -> Pixels:
        """A part of the pixels (H, W, 3), stretched to their size."""
        if crop is None:
            return pixels
        top, left, height, width = crop
        part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        return resize(part, (pixels.shape[0], pixels.shape[1]), self.interpolation)


class NormalizedTransform(ABC):
    """An augmentation of the normalised image."""

    @abstractmethod
    def __call__(self, image: FloatImage, rng: np.random.Generator) -> Mapping[str, float] | None:
        """Changes the image (3, H, W) in place; all randomness comes from `rng`.

        Returns:
            Numbers about the image, the same names for each; they join `Batch.side`.
        """


class ImageTransform:
    """Turns a picture's pixels into the model's input.

    Args:
        size: (H, W) of the input.
        mean: Per channel, for values in [0, 1].
        std: Per channel, for values in [0, 1].
        steps: Augmentations in their order; those on pixels come first.
        interpolation: Of the resize.
        decoding: `reduced` reads large JPEG files at a fraction of their size; see `read_image`.
        maps: What is read beside each image and moved with it.

    Attributes:
        size: (H, W) of the input.
        interpolation: Of the resize.
        maps: As above.

    Raises:
        ValueError: A step on pixels comes after one on the normalised image.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        steps: Sequence[PixelTransform | NormalizedTransform] = (),
        *,
        interpolation: Interpolation = "bicubic",
        decoding: Decoding = "exact",
        maps: Sequence[ImageMap] = (),
    ) -> None:
        self.size = size
        self.maps = tuple(maps)
        self.interpolation: Interpolation = interpolation
        self._least = size if decoding == "reduced" else None
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
        # Compiles the kernels now; otherwise each worker would.
        black = self.resize(np.zeros((1, 1, 3), np.uint8))
        _normalize(black, False, 0, 0, self._table, np.empty((3, *size), np.float32))

    def read(self, path: str, data: bytearray | None = None) -> Pixels:
        """An image file at the input's size, (H, W, 3); see `read_image`.

        Raises:
            DataError: The file cannot be read.
        """
        return self.resize(read_image(path, data, self._least))

    def resize(self, pixels: Pixels) -> Pixels:
        """Pixels (height, width, 3) at the input's size, (H, W, 3)."""
        return resize(pixels, self.size, self.interpolation)

    def normalize(self, pixels: Pixels, out: FloatImage) -> None:
        """Writes the input that is made of resized pixels without augmentation.

        Args:
            pixels: (H, W, 3), not written to.
            out: (3, H, W).
        """
        _normalize(pixels, False, 0, 0, self._table, out)

    def finish(
        self,
        pixels: Pixels,
        out: FloatImage,
        rng: np.random.Generator,
        other: Callable[[], Pixels],
        track: list[Geometry] | None = None,
    ) -> dict[str, float]:
        """Augments and normalises resized pixels, and writes the result to `out`.

        Args:
            pixels: (H, W, 3), not written to.
            out: (3, H, W).
            rng: See `PixelTransform`.
            other: See `PixelTransform`.
            track: Gets what moves pixels, in its order; None: nobody asks.

        Returns:
            The augmentations' numbers about the image, for `Batch.side`.
        """
        # Moves wait until normalisation, which copies the pixels anyway.
        move = _STILL
        for change in self._on_pixels:
            if isinstance(change, MoveTransform):
                following = change.draw(rng)
                if track is not None:
                    track.append(following)
                if move[1:] != (0, 0) and following[1:] != (0, 0):
                    # Not one shift by the sum: pixels pushed out by the first do not come back.
                    pixels, move = _moved(pixels, move), following
                elif following.mirror:
                    move = Move(not move.mirror, move.down + following.down,
                                following.right - move.right)  # fmt: skip
                else:
                    move = Move(move.mirror, move.down + following.down,
                                move.right + following.right)  # fmt: skip
            elif isinstance(change, CropTransform):
                crop = change.draw(rng, self.size)
                if track is not None and crop is not None:
                    track.append(crop)
                pixels, move = change.stretch(_moved(pixels, move), crop), _STILL
            else:
                pixels, move = change(_moved(pixels, move), rng, other), _STILL
        _normalize(pixels, move.mirror, move.down, move.right, self._table, out)
        side: dict[str, float] = {}
        for change_normalized in self._on_normalized:
            side.update(change_normalized(out, rng) or {})
        return side


def _moved(pixels: Pixels, move: Move) -> Pixels:
    """The pixels (H, W, 3) where `move` puts them."""
    if move.mirror:
        pixels = _mirrored(pixels)
    if move[1:] == (0, 0):
        return pixels
    height, width, _ = pixels.shape
    _, down, right = move
    moved = np.zeros_like(pixels)
    moved[max(down, 0) : max(height + down, 0), max(right, 0) : max(width + right, 0)] = pixels[
        max(-down, 0) : max(height - down, 0), max(-right, 0) : max(width - right, 0)
    ]
    return moved


def _mirrored(pixels: Pixels) -> Pixels:
    """The pixels (H, W, 3), left for right."""
    # torch does this a few times as fast as numpy or a loop.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].flip(3)
    return np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())


@njit(cache=True)
def _normalize(
    pixels: Pixels, mirror: bool, down: int, right: int, table: FloatImage, out: FloatImage
) -> None:
    """Moves pixels, and looks each grey level up in the table (3, 256) of normalised values."""
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, width * 3)
    for y in range(height):
        inside = 0 <= y - down < height
        first = min(max(right, 0), width) if inside else width
        last = max(min(width + right, width), first) if inside else width
        for channel in range(3):  # one loop for three channels would take a third longer
            levels, line = table[channel], out[channel, y]
            line[:first] = levels[0]
            line[last:] = levels[0]
            if first >= last:
                continue
            count, shown = last - first, line[first:last]
            # One loop for both directions, with a step of 1 or -1, is slower too.
            if mirror:
                row = rows[y - down, 3 * (width + right - last) : 3 * (width + right - first)]
                for i in range(count):
                    shown[count - 1 - i] = levels[row[3 * i + channel]]
            else:
                row = rows[y - down, 3 * (first - right) : 3 * (last - right)]
                for i in range(count):
                    shown[i] = levels[row[3 * i + channel]]
