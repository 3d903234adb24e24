"""Maps that are read beside an image, such as heatmaps of joints, and move with it.

Resizes, mirror images, shifts and crops act on rows and on columns on their own, and linearly. So
each is a matrix for the rows and one for the columns, and a map is resampled only once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from reid.data.resize import resize_matrix
from reid.structures import ImageRecord

FloatMap = npt.NDArray[np.float32]
"""A map (C, h, w)."""


class Move(NamedTuple):
    """A mirror and a shift; uncovered pixels are black.

    Attributes:
        mirror: Left for right, before the shift.
        down: Pixels of the shift, negative is up.
        right: Pixels of the shift, negative is left.
    """

    mirror: bool = False
    down: int = 0
    right: int = 0


class Crop(NamedTuple):
    """A rectangle that is stretched to the image's size.

    Attributes:
        top: Pixels above it.
        left: Pixels to its left.
        height: Pixels.
        width: Pixels.
    """

    top: int
    left: int
    height: int
    width: int


Geometry = Move | Crop
"""What a step of augmentation does to places in the image."""


class ImageMap(ABC):
    """What is registered in MAP: a map that belongs to each image.

    Erasing and changes of colour leave it as it is.

    Attributes:
        side: Its name in `Batch.side`.
        mirror: For each of its C channels, the channel whose values it has in the mirror image.
        stride: Pixels of the network's input for one place of the map.
    """

    side: str
    mirror: Sequence[int]
    stride: int = 4

    @abstractmethod
    def check(self, records: Sequence[ImageRecord]) -> None:
        """Checks, before the first image is read, that the images have this map.

        Raises:
            DataError: One has none; names the image.
        """

    @abstractmethod
    def read(self, record: ImageRecord) -> FloatMap:
        """The map (C, h, w) of a whole image as it is on disk, of any size.

        Raises:
            DataError: There is none, or it cannot be used; names the image.
        """


def map_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(h, w) of the map for an input of `size` (H, W)."""
    return max(1, size[0] // stride), max(1, size[1] // stride)


def move_map(
    values: FloatMap, size: tuple[int, int], source: ImageMap, track: Sequence[Geometry]
) -> FloatMap:
    """A map that has gone where its image went.

    Args:
        values: (C, h0, w0), of the whole image.
        size: (H, W) of the network's input.
        source: Where it comes from.
        track: The image's moves and crops after its resize.

    Returns:
        (C, h, w), bilinear, 0 where the image shows its black border.
    """
    height, width = map_size(size, source.stride)
    down, right = size[0] / height, size[1] / width  # pixels for one place
    rows = resize_matrix(values.shape[1], height, "bilinear")
    columns = resize_matrix(values.shape[2], width, "bilinear")
    mirrored = False
    for step in track:
        if isinstance(step, Move):
            if step.mirror:
                columns, mirrored = columns[::-1], not mirrored
            rows = _shift(height, step.down / down) @ rows
            columns = _shift(width, step.right / right) @ columns
        else:
            rows = _stretch(height, step.top / down, step.height / down) @ rows
            columns = _stretch(width, step.left / right, step.width / right) @ columns
    moved: FloatMap = np.matmul(np.matmul(rows, values), columns.T)
    return moved[[*source.mirror]] if mirrored else moved


def _shift(count: int, places: float) -> FloatMap:
    """(count, count): values go on by a number of places."""
    whole = math.floor(places)
    part = places - whole
    near, far = np.eye(count, k=-whole), np.eye(count, k=-whole - 1)
    return ((1 - part) * near + part * far).astype(np.float32)


def _stretch(count: int, start: float, length: float) -> FloatMap:
    """(count, count): the values from `start` on are stretched to all places."""
    at = start - 0.5 + (np.arange(count) + 0.5) * (length / count)
    at = np.clip(at, max(0.0, start), min(count - 1, start + length - 1))
    weights: FloatMap = np.maximum(1 - np.abs(at[:, None] - np.arange(count)), 0).astype(np.float32)
    return weights
