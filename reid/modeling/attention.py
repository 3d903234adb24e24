"""Attention among the channels and among the positions of a map, alone and in a ResNet.

Both modules are those of DANet (Fu et al., *Dual Attention Network for Scene Segmentation*, CVPR
2019), as ABD-Net uses them (Chen et al., ICCV 2019, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Attention = Literal["channels", "positions"]


class ChannelAttention(nn.Module):
    """Adds to each channel of a map a weighted sum of its channels: X + gamma A X.

    With X (channels x positions) and E = X X^T, A is the softmax over each row of -E, so the
    channels that are least alike get the weight. Energies are computed in float32 under mixed
    precision too. gamma starts at 0: then the map stays as it is.

    Args:
        channels: Of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        with torch.autocast(feature.device.type, enabled=False):
            rows = feature.flatten(2).float()
            weights = (-(rows @ rows.transpose(1, 2))).softmax(2)
            added = (weights @ rows).reshape(feature.shape)
            return (feature + self.gamma * added).to(feature.dtype)


class PositionAttention(nn.Module):
    """Adds to each position of a map a weighted sum over its positions: X + gamma V A^T.

    A is the softmax over each row of the inner products of queries and keys, which are not scaled;
    queries, keys and values are 1x1 convolutions of the map. gamma starts at 0.

    Args:
        channels: Of the map; queries and keys have an eighth of them.

    Raises:
        ValueError: There are fewer than 8 channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 8:
            raise ValueError(
                f"attention: positions needs a map with 8 channels or more, got {channels}"
            )
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        query, key, value = (
            layer(feature).flatten(2).float() for layer in (self.query, self.key, self.value)
        )
        with torch.autocast(feature.device.type, enabled=False):
            weights = (query.transpose(1, 2) @ key).softmax(2)
            added: Tensor = (value @ weights.transpose(1, 2)).reshape(feature.shape)
            return (feature + self.gamma * added).to(feature.dtype)


def build_attention(kind: Attention, channels: int) -> nn.Module:
    """A module that attends to the channels or to the positions of a map.

    Raises:
        ValueError: The kind is unknown, or the map has too few channels.
    """
    kinds: Mapping[str, type[nn.Module]] = {
        "channels": ChannelAttention,
        "positions": PositionAttention,
    }
    if kind not in kinds:
        raise ValueError(f"attention: expected {' or '.join(kinds)}, got {kind!r}")
    return kinds[kind](channels)


def put_attention(net: Any, stages: Mapping[str, Attention]) -> None:
    """Puts attention at the end of stages of a network of timm, as the module `attention` there.

    Args:
        net: Changed in place.
        stages: What each stage attends to, by the stage's name, such as `layer1`.

    Raises:
        ValueError: The network has no such stage, or its stages do not give maps.
    """
    channels = {info["module"]: info["num_chs"] for info in getattr(net, "feature_info", ())}
    known = [name for name in channels if isinstance(getattr(net, name, None), nn.Sequential)]
    for name, kind in stages.items():
        if name not in known:
            raise ValueError(
                f"attention: expected stages of the network ({', '.join(known) or 'it has none'}), "
                f"got {name!r}"
            )
        getattr(net, name).add_module("attention", build_attention(kind, channels[name]))
