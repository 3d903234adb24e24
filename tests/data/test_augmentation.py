from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2

import reid.data.augmentation  # noqa: F401  (registers)
from reid.data.augmentation import (
    AutoAugment,
    ColorJitter,
    LocalGrayscale,
    PadCrop,
    RandomBlur,
    RandomErasing,
    RandomFlip,
    RandomPatch,
)
from reid.data.transforms import PixelTransform
from reid.registry import TRANSFORM, ConfigError, build

MEAN = (0.35, 0.31, 0.3)
ALWAYS: dict[str, PixelTransform] = {
    "flip": RandomFlip(1.0),
    "crop": PadCrop(5),
    "grey": LocalGrayscale(1.0),
    "patch": RandomPatch(1.0),
    "jitter": ColorJitter(1.0, 0.3, 0.3, 0.3, 0.2),
    "auto": AutoAugment(1.0),
    "blur": RandomBlur(1.0, (1.0, 2.0)),
}


def picture(seed: int = 0, height: int = 64, width: int = 32) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (8, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height)))


def apply(step: PixelTransform, seed: int, pixels: np.ndarray | None = None) -> np.ndarray:
    return step(picture() if pixels is None else pixels, np.random.default_rng(seed),
                lambda: picture(1))  # fmt: skip


@pytest.mark.parametrize("name", ALWAYS)
def test_uses_only_its_generator_and_leaves_the_input(name: str) -> None:
    step, pixels = ALWAYS[name], picture()
    before = pixels.copy()
    torch.manual_seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    results = [apply(step, seed, pixels) for seed in range(12)]
    assert np.array_equal(pixels, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    torch.rand(5)
    for seed, result in enumerate(results):
        assert result.shape == pixels.shape
        assert result.dtype == np.uint8
        assert result.flags.c_contiguous
        assert np.array_equal(result, apply(step, seed, pixels))
    assert any(not np.array_equal(result, before) for result in results)
    if name != "flip":
        assert len({result.tobytes() for result in results}) > 6


@pytest.mark.parametrize(
    "step",
    [RandomFlip(0), PadCrop(0), LocalGrayscale(0), RandomPatch(0), ColorJitter(0), AutoAugment(0),
     RandomBlur(0), ColorJitter(1, 0, 0, 0, 0)],
)  # fmt: skip
def test_never(step: PixelTransform) -> None:
    for seed in range(5):
        assert np.array_equal(apply(step, seed), picture())


@pytest.mark.parametrize("kind", [RandomFlip, LocalGrayscale, RandomPatch, RandomBlur])
def test_as_often_as_it_says(kind: type[PixelTransform]) -> None:
    changed = [not np.array_equal(apply(kind(0.3), s), picture()) for s in range(400)]
    assert 80 < sum(changed) < 160


def test_flip() -> None:
    assert np.array_equal(apply(ALWAYS["flip"], 0), picture()[:, ::-1])


def test_crop_shifts_evenly_over_black() -> None:
    white = np.full((8, 4, 3), 255, np.uint8)
    places = set()
    for seed in range(400):
        rows, columns, _ = apply(PadCrop(2), seed, white).nonzero()
        places.add((rows.min(), rows.max(), columns.min(), columns.max()))
    shifts = [(0, 5), (0, 6), (0, 7), (1, 7), (2, 7)], [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert places == {(*down, *right) for down in shifts[0] for right in shifts[1]}
    assert not apply(PadCrop(500), 1, white).any()


def test_crop_is_a_window_of_the_padded_picture() -> None:
    padded = np.pad(picture(), ((5, 5), (5, 5), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (64, 32, 3))[:, :, 0]
    for seed in range(5):
        assert (apply(PadCrop(5), seed) == windows).all((2, 3, 4)).any()


def erased(fill, seed: int = 0, size: tuple[int, int] = (128, 64), **options) -> np.ndarray:
    image = np.full((3, *size), 9.0, np.float32)
    RandomErasing(fill=fill, mean=MEAN, **options)(image, np.random.default_rng(seed))
    return image


def test_erased_area_and_aspect() -> None:
    images = [erased("mean", seed) for seed in range(600)]
    found = [np.argwhere(image[0] != 9) for image in images if (image != 9).any()]
    assert 250 < len(found) < 350
    shares = []
    for where in found:
        height, width = (where.max(0) - where.min(0) + 1).tolist()
        assert height * width == len(where)
        assert 0.25 < height / width < 3.9
        shares.append(len(where) / (128 * 64))
    assert 0.015 < min(shares) < 0.05
    assert 0.3 < max(shares) < 0.42
    tall = [np.argwhere(erased("mean", s, prob=1.0, aspect=(2.0, 3.0))[0] != 9) for s in range(50)]
    for where in tall:
        height, width = (where.max(0) - where.min(0) + 1).tolist()
        assert 1.8 < height / width < 3.3


def test_fills_of_erasing() -> None:
    for fill, values in (("raw_mean", MEAN), ("mean", (0, 0, 0)), ((1.0, 2.0, 3.0), (1, 2, 3))):
        image = erased(fill, prob=1.0)
        where = (image != 9).any(0)
        assert where.any()
        assert np.array_equal(
            image[:, where], np.repeat(np.float32(values)[:, None], where.sum(), 1)
        )
    noise = erased("noise", prob=1.0, area=(0.3, 0.3))
    values = noise[:, (noise != 9).any(0)]
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05
    assert len(np.unique(values)) > 0.99 * values.size


def test_erasing_gives_up_where_nothing_fits() -> None:
    assert (erased("mean", prob=1.0, size=(1, 1)) == 9).all()


def test_grey_rectangle() -> None:
    luma = np.asarray(Image.fromarray(picture()).convert("L"))
    for seed in range(20):
        found = apply(ALWAYS["grey"], seed)
        changed = np.argwhere((found != picture()).any(2))
        assert 0.01 < len(changed) / luma.size < 0.42
        (top, left), (bottom, right) = changed.min(0), changed.max(0) + 1
        part = found[top:bottom, left:right]
        assert np.array_equal(part, np.repeat(luma[top:bottom, left:right, None], 3, 2))


def test_patch_is_of_the_other_image() -> None:
    step = RandomPatch(1.0, rotate_prob=0, flip_prob=0)
    for seed in range(20):
        found = apply(step, seed)
        changed = np.argwhere((found != picture()).any(2))
        (top, left), (bottom, right) = changed.min(0), changed.max(0) + 1
        patch = found[top:bottom, left:right]
        windows = np.lib.stride_tricks.sliding_window_view(picture(1), patch.shape)[:, :, 0]
        assert (windows == patch).all((2, 3, 4)).any()
    flipped = apply(RandomPatch(1.0, rotate_prob=0, flip_prob=1), 3)
    assert not np.array_equal(flipped, apply(step, 3))


def test_jitter_is_torchvisions_operation_in_its_range() -> None:
    image = torch.from_numpy(picture()).permute(2, 0, 1)
    lowest = v2.functional.adjust_brightness(image, 0.5).float().mean()
    highest = v2.functional.adjust_brightness(image, 1.5).float().mean()
    means = [apply(ColorJitter(1, 0.5, 0, 0, 0), s).mean() for s in range(60)]
    assert lowest <= min(means) < 0.75 * image.float().mean()
    assert highest >= max(means) > 1.2 * image.float().mean()


def test_blur_is_pillows() -> None:
    found = apply(RandomBlur(1.0, (1.5, 1.5)), 0)
    expected = Image.fromarray(picture()).filter(ImageFilter.GaussianBlur(1.5))
    assert np.array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "RandomFlip", "prob": 1.5}, "prob: expected a probability from 0 to 1, got 1.5"),
        ({"name": "PadCrop", "pad": -1}, "pad: expected 0 or more pixels, got -1"),
        ({"name": "RandomErasing", "area": [0.4, 0.02]}, r"area: expected \[smallest, largest\]"),
        ({"name": "RandomErasing", "aspect": [0, 1]}, r"aspect: expected \[smallest, largest\]"),
        ({"name": "RandomErasing", "fill": "grey"}, r"\.fill: expected .*raw_mean.* got 'grey'"),
        ({"name": "RandomErasing", "mean": [0, 0, 0]}, r"\.mean: comes from the data"),
        ({"name": "RandomPatch", "flip_prob": 2}, "flip_prob: expected a probability"),
        ({"name": "ColorJitter", "hue": 0.6}, "hue: expected 0 to 0.5, got 0.6"),
        ({"name": "ColorJitter", "contrast": -0.6}, "contrast: expected 0 or more, got -0.6"),
        ({"name": "AutoAugment", "policy": "imagnet"}, "mean 'imagenet'"),
        ({"name": "RandomBlur", "radius": [2, 1]}, r"radius: expected \[smallest, largest\]"),
        ("RandomErasign", "mean 'RandomErasing'"),
    ],
)
def test_wrong_options_are_named(spec: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TRANSFORM, spec, "input.transforms[0]", mean=MEAN)
