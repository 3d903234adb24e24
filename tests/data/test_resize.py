from __future__ import annotations

import numpy as np
import PIL
import pytest
from PIL import Image

from reid.data.resize import resize

SIZES = [
    # height, width, size
    (128, 64, (256, 128)),
    (300, 120, (256, 128)),  # vertical first
    (300, 140, (256, 128)),  # vertical first
    (148, 110, (64, 64)),
    (411, 97, (384, 128)),  # vertical first
    (384, 140, (384, 128)),
    (300, 128, (256, 128)),
    (30, 200, (64, 64)),
    (900, 411, (64, 32)),
    (1, 1, (16, 8)),
    (3, 125, (384, 128)),
    (64, 32, (64, 32)),
]


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
@pytest.mark.parametrize("levels", [2, 256])
def test_pixels_equal_pillows(height, width, size, interpolation, levels) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
    pixels = drawn.astype(np.uint8)
    pillow = Image.Resampling[interpolation.upper()]
    shapes = [(size[1], height), size[::-1]]
    if height - size[0] > max(0, 2 * (width - size[1])):
        shapes = [(width, size[0]), size[::-1]]
    expected = Image.fromarray(pixels)
    for shape in shapes:  # so that the order does not depend on Pillow's version
        expected = expected.resize(shape, pillow)
    found = resize(pixels, size, interpolation)
    assert found.flags.c_contiguous
    assert found.dtype == np.uint8
    assert difference(found, np.asarray(expected)) <= 1
    if int(PIL.__version__.split(".")[0]) >= 13:
        whole = np.asarray(Image.fromarray(pixels).resize(size[::-1], pillow))
        assert difference(found, whole) <= 1


def test_any_size() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        height, width, *size = (int(n) for n in rng.integers(1, 60, 4))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        steps = [(size[1], height), (width, size[0])]
        first = steps[height - size[0] > max(0, 2 * (width - size[1]))]
        halfway = Image.fromarray(pixels).resize(first, Image.Resampling.BICUBIC)
        expected = np.asarray(halfway.resize((size[1], size[0]), Image.Resampling.BICUBIC))
        assert difference(resize(pixels, (size[0], size[1]), "bicubic"), expected) <= 1
