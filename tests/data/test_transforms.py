from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from reid.data.transforms import RandomErasing, eval_transform, train_transform

MEAN, STD = (0.35, 0.31, 0.31), (0.26, 0.25, 0.25)


def picture(height: int = 60, width: int = 30) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_eval_is_bicubic_then_normalised() -> None:
    image = eval_transform((32, 16), MEAN, STD)(picture())
    pixels = np.asarray(picture().resize((16, 32), Image.Resampling.BICUBIC)) / 255
    expected = (pixels - np.array(MEAN)) / np.array(STD)
    torch.testing.assert_close(
        image, torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-5, rtol=0
    )
    assert type(image) is torch.Tensor


def test_train_without_randomness_is_eval() -> None:
    plain = train_transform((32, 16), MEAN, STD, flip_prob=0, pad=0, erasing_prob=0)
    torch.testing.assert_close(plain(picture()), eval_transform((32, 16), MEAN, STD)(picture()))


def test_flip_and_black_border() -> None:
    flip = train_transform((32, 16), MEAN, STD, flip_prob=1, pad=0, erasing_prob=0)
    straight = eval_transform((32, 16), MEAN, STD)
    torch.testing.assert_close(flip(picture()), straight(picture()).flip(2))
    pad = train_transform((32, 16), MEAN, STD, flip_prob=0, pad=10, erasing_prob=0)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    white = Image.new("RGB", (16, 32), (255, 255, 255))
    torch.manual_seed(0)
    shifted = [pad(white) for _ in range(20)]
    assert all(image.shape == (3, 32, 16) for image in shifted)
    values = torch.stack(shifted)
    is_black = torch.isclose(values, black[:, None, None], atol=1e-5).all(1)
    assert 0.1 < is_black.float().mean() < 0.7


def test_erasing_fills_with_the_numbers_of_the_mean() -> None:
    erase = train_transform((64, 32), MEAN, STD, flip_prob=0, pad=0, erasing_prob=1)
    torch.manual_seed(0)
    image = erase(picture())
    changed = (image != eval_transform((64, 32), MEAN, STD)(picture())).any(0)
    torch.testing.assert_close(
        image[:, changed], torch.tensor(MEAN)[:, None].expand(-1, int(changed.sum()))
    )


def test_erased_area_and_aspect() -> None:
    torch.manual_seed(0)
    erase = RandomErasing(0.5, (9.0, 9.0, 9.0))
    images = [erase(torch.zeros(3, 128, 64)) for _ in range(600)]
    erased = [(image[0] == 9).nonzero() for image in images if bool(image.any())]
    assert 250 < len(erased) < 350
    shares = []
    for where in erased:
        height, width = (where.amax(0) - where.amin(0) + 1).tolist()
        assert height * width == len(where)
        assert 0.25 < height / width < 3.9
        shares.append(len(where) / (128 * 64))
    assert 0.015 < min(shares) < 0.05
    assert 0.3 < max(shares) < 0.42


def test_erasing_gives_up_where_nothing_fits() -> None:
    image = torch.zeros(3, 1, 1)
    assert RandomErasing(1.0, (1.0, 1.0, 1.0))(image) is image
