"""Augmentations by name, for `INPUT.TRANSFORMS`: the TRANSFORM registry.

Their random numbers come from a generator that is seeded for each image, so the result depends
neither on the process that reads the image nor on the images read before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from reid.data.maps import Move
from reid.data.resize import Pixels
from reid.data.transforms import (
    FloatImage,
    MoveTransform,
    NormalizedTransform,
    PixelTransform,
)
from reid.registry import TRANSFORM

Box = tuple[int, int, int, int]
"""Top, left, height, width."""

_TRIES = 100


@TRANSFORM.register()
class RandomFlip(MoveTransform):
    """The mirror image, left for right.

    Args:
        prob: Probability of the flip.

    Raises:
        ValueError: The probability is not in [0, 1].
    """

    def __init__(self, prob: float = 0.5) -> None:
        self._prob = _probability(prob)

    def draw(self, rng: np.random.Generator) -> Move:
        """Mirrored or not."""
        return Move(mirror=rng.random() < self._prob)


@TRANSFORM.register()
class PadCrop(MoveTransform):
    """A black border, then a crop of the old size at a uniformly random place: a shift.

    Args:
        pad: Border in pixels, on each side; black before normalisation.

    Raises:
        ValueError: The border is negative.
    """

    def __init__(self, pad: int = 10) -> None:
        if pad < 0:
            raise ValueError(f"pad: expected 0 or more pixels, got {pad}")
        self._pad = pad

    def draw(self, rng: np.random.Generator) -> Move:
        """A shift by -pad to pad pixels, down and right."""
        down, right = (_integer(rng, 2 * self._pad + 1) - self._pad for _ in range(2))
        return Move(down=down, right=right)


@TRANSFORM.register()
class RandomErasing(NormalizedTransform):
    """A rectangle of the normalised image is overwritten (Zhong et al., AAAI 2020).

    A share of the area and an aspect ratio (height / width) are drawn evenly until the rectangle
    fits into the image, up to 100 times; then it is placed evenly.

    Args:
        prob: Probability that an image is erased.
        area: Smallest and largest share of the image that is erased.
        aspect: Smallest and largest aspect ratio.
        fill: What the rectangle is filled with. `raw_mean`: the numbers of `mean`, written into
            the normalised image as the field's code does, although the mean is 0 there. `mean`: 0,
            the same as erasing with the mean pixel before normalisation (BoT). `noise`: normally
            distributed numbers (TransReID). Or three numbers, one a channel, in normalised units.
        mean: The mean that normalisation subtracts, per channel.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        prob: float = 0.5,
        area: tuple[float, float] = (0.02, 0.4),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
        fill: Literal["raw_mean", "mean", "noise"] | tuple[float, float, float] = "raw_mean",
        *,
        mean: Sequence[float],
    ) -> None:
        self._prob = _probability(prob)
        self._boxes = _Boxes(area, aspect)
        colour = {"raw_mean": mean, "mean": (0.0, 0.0, 0.0), "noise": None}
        if isinstance(fill, str) and fill not in colour:
            raise ValueError(f"fill: expected {', '.join(colour)} or three numbers, got {fill!r}")
        numbers = colour[fill] if isinstance(fill, str) else fill
        self._fill = None if numbers is None else np.array(numbers, np.float32)[:, None, None]

    def __call__(self, image: FloatImage, rng: np.random.Generator) -> None:
        """Erases, or leaves the image as it is."""
        if rng.random() >= self._prob:
            return
        box = self._boxes.draw(image.shape[1:], rng)
        if box is None:
            return
        top, left, height, width = box
        image[:, top : top + height, left : left + width] = (
            rng.standard_normal((len(image), height, width), np.float32)
            if self._fill is None
            else self._fill
        )


@TRANSFORM.register()
class LocalGrayscale(PixelTransform):
    """A rectangle loses its colours (Gong et al. 2021: local greyscale transformation, LGT).

    The rectangle is drawn as in `RandomErasing`; grey is ITU-R 601 luma.

    Args:
        prob: Probability that an image is changed.
        area: Smallest and largest share of the image.
        aspect: Smallest and largest aspect ratio (height / width).

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        prob: float = 0.4,
        area: tuple[float, float] = (0.02, 0.4),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
    ) -> None:
        self._prob = _probability(prob)
        self._boxes = _Boxes(area, aspect)

    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """With a grey rectangle, or as it is."""
        if rng.random() >= self._prob:
            return pixels
        box = self._boxes.draw(pixels.shape[:2], rng)
        if box is None:
            return pixels
        top, left, height, width = box
        changed: Pixels = pixels.copy()
        part = changed[top : top + height, left : left + width]
        part[:] = np.asarray(Image.fromarray(part).convert("L"))[:, :, None]
        return changed


@TRANSFORM.register()
class RandomPatch(PixelTransform):
    """A rectangle of another training image is pasted in, as torchreid does (Zhou et al. 2019).

    torchreid takes the patch from a pool of patches of earlier images; here the other image is any
    of the training set, since pools would differ from worker to worker. The patch is cut, mirrored,
    turned by up to 10 degrees about its middle (black corners), and pasted at a uniformly random
    place.

    Args:
        prob: Probability that an image gets a patch.
        area: Smallest and largest share of the image.
        aspect: Smallest and largest aspect ratio (height / width).
        flip_prob: Probability that the patch is mirrored.
        rotate_prob: Probability that it is turned.

    Raises:
        ValueError: A number is out of its range.
    """

    _DEGREES = 10

    def __init__(
        self,
        prob: float = 0.5,
        area: tuple[float, float] = (0.01, 0.5),
        aspect: tuple[float, float] = (0.1, 10.0),
        flip_prob: float = 0.5,
        rotate_prob: float = 0.5,
    ) -> None:
        self._prob = _probability(prob)
        self._boxes = _Boxes(area, aspect)
        self._flip_prob = _probability(flip_prob, "flip_prob")
        self._rotate_prob = _probability(rotate_prob, "rotate_prob")

    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """With a patch, or as it is."""
        if rng.random() >= self._prob:
            return pixels
        box = self._boxes.draw(pixels.shape[:2], rng)
        if box is None:
            return pixels
        top, left, height, width = box
        patch = other()[top : top + height, left : left + width]
        if rng.random() < self._flip_prob:
            patch = patch[:, ::-1]
        if rng.random() < self._rotate_prob:
            degrees = _integer(rng, 2 * self._DEGREES + 1) - self._DEGREES
            patch = np.asarray(Image.fromarray(np.ascontiguousarray(patch)).rotate(degrees))
        changed: Pixels = pixels.copy()
        top = _integer(rng, pixels.shape[0] - height + 1)
        left = _integer(rng, pixels.shape[1] - width + 1)
        changed[top : top + height, left : left + width] = patch
        return changed


@TRANSFORM.register()
class ColorJitter(PixelTransform):
    """Brightness, contrast, saturation and hue change, in random order (torchvision's operations).

    Args:
        prob: Probability that an image is changed.
        brightness: b: a factor from [max(0, 1 - b), 1 + b].
        contrast: The same.
        saturation: The same.
        hue: h: a turn of the colour circle by [-h, h], at most 0.5.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        prob: float = 0.5,
        brightness: float = 0.15,
        contrast: float = 0.15,
        saturation: float = 0.1,
        hue: float = 0.1,
    ) -> None:
        self._prob = _probability(prob)
        for name, value in (("brightness", brightness), ("contrast", contrast),
                            ("saturation", saturation)):  # fmt: skip
            if value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue: expected 0 to 0.5, got {hue}")
        adjust = v2.functional
        changes = (
            (adjust.adjust_brightness, (max(0.0, 1 - brightness), 1 + brightness)),
            (adjust.adjust_contrast, (max(0.0, 1 - contrast), 1 + contrast)),
            (adjust.adjust_saturation, (max(0.0, 1 - saturation), 1 + saturation)),
            (adjust.adjust_hue, (-hue, hue)),
        )
        self._changes = [change for change in changes if change[1][0] < change[1][1]]

    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """With other colours, or as it is."""
        if rng.random() >= self._prob:
            return pixels
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        for number in rng.permutation(len(self._changes)):
            adjust, bounds = self._changes[number]
            image = adjust(image, _between(rng, bounds))
        changed: Pixels = image.permute(1, 2, 0).contiguous().numpy()
        return changed


@TRANSFORM.register()
class AutoAugment(PixelTransform):
    """Two operations of a policy that was learned on ImageNet (Cubuk et al., CVPR 2019).

    Args:
        prob: Probability that an image is changed.
        policy: `imagenet`, `cifar10` or `svhn`, as in torchvision.

    Raises:
        ValueError: The probability is not in [0, 1].
    """

    def __init__(
        self, prob: float = 0.1, policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet"
    ) -> None:
        self._prob = _probability(prob)
        self._augment = v2.AutoAugment(v2.AutoAugmentPolicy(policy))

    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """Changed by the policy, or as it is."""
        if rng.random() >= self._prob:
            return pixels
        # torchvision uses torch's generator, whose state must not change here.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_integer(rng, 2**53))
            return np.array(self._augment(Image.fromarray(pixels)))


@TRANSFORM.register()
class RandomBlur(PixelTransform):
    """Gaussian blur (as Chen et al., *SimCLR*, 2020, with Pillow's filter).

    Args:
        prob: Probability that an image is blurred.
        radius: Smallest and largest standard deviation in pixels of the resized image.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, prob: float = 0.5, radius: tuple[float, float] = (0.1, 2.0)) -> None:
        self._prob = _probability(prob)
        if not 0 <= radius[0] <= radius[1]:
            raise ValueError(
                f"radius: expected [smallest, largest] from 0 pixels, got {list(radius)}"
            )
        self._radius = radius

    def __call__(
        self, pixels: Pixels, rng: np.random.Generator, other: Callable[[], Pixels]
    ) -> Pixels:
        """Blurred, or as it is."""
        if rng.random() >= self._prob:
            return pixels
        blur = ImageFilter.GaussianBlur(_between(rng, self._radius))
        return np.array(Image.fromarray(pixels).filter(blur))


class _Boxes:
    """Random rectangles: share of the area and aspect ratio (height / width) are drawn evenly.

    Raises:
        ValueError: A range is empty or out of its bounds.
    """

    def __init__(self, area: tuple[float, float], aspect: tuple[float, float]) -> None:
        if not 0 < area[0] <= area[1] < 1:
            raise ValueError(
                "area: expected [smallest, largest] with 0 < smallest <= largest < 1, got "
                f"{list(area)}"
            )
        if not 0 < aspect[0] <= aspect[1] < math.inf:
            raise ValueError(
                f"aspect: expected [smallest, largest] with 0 < smallest, got {list(aspect)}"
            )
        self._area = area
        self._aspect = aspect

    def draw(self, size: Sequence[int], rng: np.random.Generator) -> Box | None:
        """A rectangle at a random place in an image of `size` (H, W); None: none fitted."""
        for _ in range(_TRIES):
            area = _between(rng, self._area) * size[0] * size[1]
            aspect = _between(rng, self._aspect)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height < size[0] and 0 < width < size[1]:
                top = _integer(rng, size[0] - height + 1)
                return top, _integer(rng, size[1] - width + 1), height, width
        return None


def _probability(value: float, name: str = "prob") -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")
    return value


def _integer(rng: np.random.Generator, count: int) -> int:
    """Evenly from 0 to count - 1; a third of the time of `rng.integers`."""
    return int(rng.random() * count)


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()
