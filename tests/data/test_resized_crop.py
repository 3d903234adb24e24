"""A random part of the image, stretched to its size."""

from __future__ import annotations

import numpy as np
import pytest

from reid.data.resized_crop import RandomResizedCrop


def test_crops_are_stretched_parts() -> None:
    picture = np.arange(64 * 32 * 3, dtype=np.uint8).reshape(64, 32, 3)
    crop = RandomResizedCrop()
    outs = [crop(picture, np.random.default_rng(seed), lambda: picture) for seed in range(8)]
    assert {out.shape for out in outs} == {picture.shape}
    assert len({out.tobytes() for out in outs}) > 4
    never = RandomResizedCrop(area=(1.0, 1.0), aspect=(9.0, 9.0))  # higher than the picture
    assert never(picture, np.random.default_rng(0), lambda: picture) is picture
    seldom = RandomResizedCrop(area=(0.79, 0.79), aspect=(2.0, 2.0), prob=0.5)
    outs = [seldom(picture, np.random.default_rng(seed), lambda: picture) for seed in range(40)]
    assert 10 < sum(out is picture for out in outs) < 30
    with pytest.raises(ValueError, match="prob: expected a probability from 0 to 1, got 2"):
        RandomResizedCrop(prob=2)
    for options in ({"area": (0.5, 0.4)}, {"area": (0.5, 1.2)}, {"aspect": (3.0, 2.0)}):
        with pytest.raises(ValueError, match="expected ascending"):
            RandomResizedCrop(**options)  # type: ignore[arg-type]
