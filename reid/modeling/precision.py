"""Convolutions that must stay in float32 under mixed precision on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast too."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'), in float32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def keep_strided_convolutions_exact(model: nn.Module) -> int:
    """Makes convolutions with a stride and a kernel above 1 compute in float32, in place.

    In bfloat16 on a CPU, torch 2.14 leaves parts of such a convolution's weight gradient unwritten
    where its output has one pixel: old memory content becomes the gradient, up to 1e34.
    Weights, names and checkpoints stay as they are.

    Args:
        model: A model that is trained on a CPU under autocast.

    Returns:
        How many convolutions were changed.
    """
    changed = 0
    for module in model.modules():
        if type(module) is nn.Conv2d and max(module.stride) > 1 and max(module.kernel_size) > 1:
            module.__class__ = Float32Conv2d
            changed += 1
    return changed
