"""From a picture to the model's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

Transform = Callable[[Image.Image], Tensor]


def eval_transform(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Bicubic resize and normalisation: an RGB picture becomes (3, H, W).

    Args:
        size: (H, W) in pixels.
        mean: Per channel, for values in [0, 1].
        std: Per channel, for values in [0, 1].
    """
    return _compose([_resize(size), *_to_tensor(mean, std)])


def train_transform(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip_prob: float,
    pad: int,
    erasing_prob: float,
    erasing_area: tuple[float, float] = (0.02, 0.4),
    erasing_fill: Sequence[float] | None = None,
) -> Transform:
    """The augmentation of the field's baselines (Luo et al., *Bag of Tricks*, CVPRW 2019).

    Bicubic resize, horizontal flip, black border and random crop back, normalisation, random
    erasing; all randomness comes from torch's generator.

    Args:
        size: (H, W) in pixels.
        mean: Per channel, for values in [0, 1].
        std: Per channel, for values in [0, 1].
        flip_prob: Probability of the flip.
        pad: Border in pixels; 0 = no crop.
        erasing_prob: Probability of erasing.
        erasing_area: Smallest and largest share of the image that is erased.
        erasing_fill: What is filled in, per channel, in normalised units. None: the numbers of
            `mean` as they are, as the field's code does, which is not the mean's normalised value.
    """
    steps: list[nn.Module] = [_resize(size)]
    if flip_prob:
        steps.append(v2.RandomHorizontalFlip(flip_prob))
    if pad:
        steps += [v2.Pad(pad), v2.RandomCrop(size)]
    steps += _to_tensor(mean, std)
    if erasing_prob:
        steps.append(RandomErasing(erasing_prob, mean if erasing_fill is None else erasing_fill,
                                   erasing_area))  # fmt: skip
    return _compose(steps)


class RandomErasing(nn.Module):
    """A rectangle of the image is overwritten (Zhong et al., *Random Erasing*, AAAI 2020).

    A share of the area and an aspect ratio (height / width) are drawn evenly until the rectangle
    fits into the image, up to 100 times; then it is placed evenly.

    Args:
        prob: Probability that an image is erased.
        fill: Per channel.
        area: Smallest and largest share of the image.
        smallest_aspect: Smallest aspect ratio; the largest is its inverse.
    """

    _TRIES = 100

    def __init__(
        self,
        prob: float,
        fill: Sequence[float],
        area: tuple[float, float] = (0.02, 0.4),
        smallest_aspect: float = 0.3,
    ) -> None:
        super().__init__()
        self._prob = prob
        self._fill = torch.tensor(fill, dtype=torch.float32)[:, None, None]
        self._area = area
        self._aspect = (smallest_aspect, 1 / smallest_aspect)

    def forward(self, image: Tensor) -> Tensor:
        """The image (C, H, W), erased or as it is."""
        if float(torch.rand(())) >= self._prob:
            return image
        height, width = image.shape[1:]
        for _ in range(self._TRIES):
            area = _uniform(*self._area) * height * width
            aspect = _uniform(*self._aspect)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top = int(torch.randint(height - h + 1, ()))
                left = int(torch.randint(width - w + 1, ()))
                erased = image.clone()
                erased[:, top : top + h, left : left + w] = self._fill
                return erased
        return image


def _compose(steps: Sequence[nn.Module]) -> Transform:
    transform: Transform = v2.Compose(steps)
    return transform


def _resize(size: tuple[int, int]) -> nn.Module:
    resize: nn.Module = v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC)
    return resize


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list[nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std),
            v2.ToPureTensor()]  # fmt: skip


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
