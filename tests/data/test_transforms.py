from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reid.data.augmentation import PadCrop, RandomBlur, RandomErasing, RandomFlip
from reid.data.transforms import ImageTransform

MEAN, STD = (0.35, 0.31, 0.31), (0.26, 0.25, 0.25)


def picture(height: int = 60, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def apply(transform: ImageTransform, pixels: np.ndarray, seed: int = 0) -> Tensor:
    out = np.full((3, *transform.size), np.nan, np.float32)
    rng = np.random.default_rng(seed)
    transform.finish(transform.resize(pixels), out, rng, lambda: transform.resize(pixels))
    return torch.from_numpy(out)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resized_and_normalised(interpolation) -> None:
    image = apply(ImageTransform((32, 16), MEAN, STD, interpolation=interpolation), picture())
    filter_ = Image.Resampling[interpolation.upper()]
    pixels = np.asarray(Image.fromarray(picture()).resize((16, 32), filter_)) / 255
    expected = torch.from_numpy((pixels - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1)
    torch.testing.assert_close(image, expected.float(), atol=1.01 / 255 / min(STD), rtol=0)
    assert float((image - expected).abs().median()) < 1e-5


def test_steps_come_in_their_order_and_pixels_first() -> None:
    erase = RandomErasing(1.0, fill=(9.0, 9.0, 9.0), mean=MEAN)
    steps = [RandomFlip(1.0), PadCrop(3), erase]
    image = apply(ImageTransform((32, 16), MEAN, STD, steps), picture(), seed=5)
    rng = np.random.default_rng(5)
    straight = ImageTransform((32, 16), MEAN, STD)
    pixels = straight.resize(picture())
    for step in steps[:2]:
        pixels = step(pixels, rng, picture)
    expected = apply(straight, pixels).numpy()
    erase(expected, rng)
    assert torch.equal(image, torch.from_numpy(expected))
    with pytest.raises(ValueError, match=r"pixels before .* \(RandomErasing\), got RandomErasing"):
        ImageTransform((32, 16), MEAN, STD, [erase, RandomFlip()])


@pytest.mark.parametrize(
    "steps",
    [
        [RandomFlip(), PadCrop(3)],
        [PadCrop(3), RandomFlip()],
        [RandomFlip(), PadCrop(3), RandomFlip(), RandomFlip(0.3)],
        [PadCrop(3), RandomFlip(), PadCrop(4), RandomFlip()],
        [PadCrop(2), RandomBlur(1.0), PadCrop(2), RandomFlip()],
        [PadCrop(40)],
    ],
)
def test_moves_while_normalising_are_the_moves_one_by_one(steps) -> None:
    straight = ImageTransform((32, 16), MEAN, STD)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pixels = straight.resize(picture())
        for step in steps:
            pixels = step(pixels, rng, picture)
        found = apply(ImageTransform((32, 16), MEAN, STD, steps), picture(), seed)
        assert torch.equal(found, apply(straight, pixels))
