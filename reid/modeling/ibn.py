"""Instance and batch normalisation side by side (IBN-Net), alone and in a ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class IBN(nn.Module):
    """InstanceNorm on the first half of the channels, BatchNorm on the second.

    Pan et al., *Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net* (ECCV
    2018). Its two layers have the names `IN` and `BN`, as in all published checkpoints.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._half = channels // 2
        self.IN = nn.InstanceNorm2d(self._half, affine=True)
        self.BN = nn.BatchNorm2d(channels - self._half)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the same memory format."""
        last = feature.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        first = feature[:, : self._half].contiguous(memory_format=layout)
        second = feature[:, self._half :].contiguous(memory_format=layout)
        if last and feature.device.type == "cpu":
            # GroupNorm with groups of one channel equals InstanceNorm, and keeps channels last. On
            # a GPU neither keeps them, and autocast runs GroupNorm in single precision.
            first = F.group_norm(first, self._half, self.IN.weight, self.IN.bias, self.IN.eps)
        else:
            first = self.IN(first)
        return torch.cat((first.contiguous(memory_format=layout), self.BN(second)), 1)


def put_ibn(net: nn.Module) -> None:
    """Makes timm's ResNet an IBN-a: IBN after the first convolution of each block of stages 1 to 3.

    Pan et al. 2018, figure 3 (a). Names and shapes become those of the published checkpoints, such
    as `resnet50_ibn_a`.

    Raises:
        ValueError: The network is not a plain ResNet of timm.
    """
    for stage in ("layer1", "layer2", "layer3"):
        blocks = list(getattr(net, stage, ()))
        if not blocks or not all(isinstance(block.bn1, nn.BatchNorm2d) for block in blocks):
            raise ValueError(f"norm: ibn needs a plain ResNet of timm, not a {type(net).__name__}")
        for block in blocks:
            block.bn1 = IBN(block.bn1.num_features)
