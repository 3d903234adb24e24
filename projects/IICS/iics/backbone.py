"""AIBN: instance and batch normalisation mixed by a learned share, and a ResNet with it."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from reid.modeling.backbones import TimmBackbone
from reid.modeling.batchnorm import GroupedStatistics, SampleGroups
from reid.registry import BACKBONE, Range

_NORMS = ("bn1", "bn2", "bn3")


class AIBN(GroupedStatistics, nn.Module):
    """Normalises each image with a mixture of its own statistics and the batch's.

    Xuan & Zhang, *Intra-Inter Camera Similarity for Unsupervised Person Re-Identification* (CVPR
    2021), as in their code. m_n and w_n are mean and unbiased variance of an image in a channel;
    M = mean(m_n) and W = mean(w_n + m_n^2) - M^2 are those of the batch (of each group of it),
    through which gradients flow; in evaluation, M and W are the running statistics. With the share
    a of the batch, from 0 to 1:

        y = weight (x - ((1 - a) m_n + a M)) / sqrt((1 - a) w_n + a W + eps) + bias

    Args:
        like: The BatchNorm that it replaces, and whose parameters and running statistics it takes
            over.
        share: (1,) the share a, which several layers may have in common; the owner of the layers
            registers it. Values outside 0 to 1 count as the nearest of the two.

    Shape:
        (B, C, H, W) to the same; computed in float32.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, like: nn.BatchNorm2d, share: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias
        self.register_buffer("running_mean", like.running_mean)
        self.register_buffer("running_var", like.running_var)
        self._eps = like.eps
        self._momentum = 0.1 if like.momentum is None else like.momentum
        self._share = (share,)  # in a tuple: a block's layers must not register it again

    def forward(self, input: Tensor) -> Tensor:
        """Normalises."""
        pixels = input.shape[2] * input.shape[3]
        rows = input.float()
        variance, mean = torch.var_mean(rows, (2, 3), correction=int(pixels > 1))
        batch_mean, batch_variance = self._batch_statistics(mean, variance)
        share = self._share[0].clamp(0, 1)
        mean = torch.lerp(mean, batch_mean, share)
        variance = torch.lerp(variance, batch_variance, share)
        scale = self.weight * torch.rsqrt(variance + self._eps)
        normalised = (rows - mean[..., None, None]) * scale[..., None, None]
        return (normalised + self.bias[:, None, None]).to(input.dtype)

    def _batch_statistics(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """M and W, (B, C) or (1, C), from those of the images (B, C)."""
        if not self.training:
            return self.running_mean[None], self.running_var[None]
        groups = SampleGroups(len(mean), self.group_size)
        sums = groups.sum(
            torch.cat((mean, variance + mean.square(), mean.new_ones(len(mean), 1)), 1)
        )
        group_mean, square = (sums[:, :-1] / sums[:, -1:].detach()).chunk(2, 1)
        group_variance = (square - group_mean.square()).clamp(min=0)
        with torch.no_grad():
            for group in range(1 if self.running == "first" else len(group_mean)):
                self.running_mean.lerp_(group_mean[group], self._momentum)
                self.running_var.lerp_(group_variance[group], self._momentum)
        return groups.of_samples(group_mean), groups.of_samples(group_variance)


@BACKBONE.register()
class AIBNResNet(TimmBackbone):
    """A ResNet with AIBN in place of every BatchNorm of its last two stages, shortcuts included.

    The layers of a block share one learned number, `adaptive_weight`, the batch's share in the
    statistics. In evaluation the features are means over an image and its mirror image, as IICS
    clusters and tests them.

    Args:
        model: timm's name of a ResNet, e.g. `resnet50`.
        image_size: (H, W) in pixels.
        batch_share: Where `adaptive_weight` starts: 0.1 is mostly instance normalisation.
        mirror: Average with the mirror image in evaluation.
        **options: The other options of `TimmBackbone`.

    Attributes:
        may_be_new: Patterns of tensors that a file of pre-trained weights need not have.

    Raises:
        ValueError: The model is not a plain ResNet of timm, or see `TimmBackbone`.
    """

    fixed_options = ("norm",)
    may_be_new = ("net.layer[34].*.adaptive_weight",)

    def __init__(
        self,
        model: str,
        image_size: tuple[int, int],
        batch_share: Annotated[float, Range(0, 1)] = 0.1,
        mirror: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, image_size, mirror=mirror, **options)
        put_aibn(self.net, batch_share)


def put_aibn(net: Any, batch_share: float) -> None:
    """Puts AIBN into the blocks of a ResNet's last two stages, in place.

    Raises:
        ValueError: The network is not a plain ResNet of timm.
    """
    for stage in ("layer3", "layer4"):
        blocks = list(getattr(net, stage, ()))
        if not blocks or not all(isinstance(block.bn1, nn.BatchNorm2d) for block in blocks):
            raise ValueError(f"AIBN needs a plain ResNet of timm, not a {type(net).__name__}")
        for block in blocks:
            put_aibn_in_block(block, batch_share)


def put_aibn_in_block(block: Any, batch_share: float) -> None:
    """Puts AIBN in place of each BatchNorm of a residual block, with one share for all."""
    block.adaptive_weight = nn.Parameter(torch.tensor([batch_share]))
    for name in _NORMS:
        if hasattr(block, name):
            setattr(block, name, AIBN(getattr(block, name), block.adaptive_weight))
    for place, layer in enumerate(block.downsample or ()):
        if isinstance(layer, nn.BatchNorm2d):
            block.downsample[place] = AIBN(layer, block.adaptive_weight)
