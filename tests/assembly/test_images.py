"""Which transforms a view of a training image has."""

from __future__ import annotations

import numpy as np
import pytest

from reid.assembly.images import build_transform
from reid.config import InputConfig
from reid.registry import ConfigError


def test_each_view_has_its_transforms() -> None:
    flip = [{"name": "RandomFlip", "prob": 1.0}]
    config = InputConfig(size=(4, 2), transforms=flip, views=[None, []])
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 3), dtype=np.uint8)
    plain = np.empty((3, 4, 2), np.float32)
    build_transform(config, training=False).normalize(pixels, plain)
    for view, flipped in enumerate((True, True, False, True)):
        transform = build_transform(config, training=True, view=view)
        image = np.empty_like(plain)
        transform.finish(pixels, image, np.random.default_rng(0), lambda: pixels)
        assert np.array_equal(image, plain[:, :, ::-1] if flipped else plain), view


def test_what_is_wrong_with_a_view_names_it() -> None:
    config = InputConfig(views=[None, ["RandomErasing", "RandomFlip"]])
    with pytest.raises(ConfigError, match=r"input\.views\[1\]: expected those on pixels before"):
        build_transform(config, training=True, view=2)
    with pytest.raises(ConfigError, match=r"input\.views: expected a list with null or a list"):
        InputConfig(views=["RandomFlip"])
