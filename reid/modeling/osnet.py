"""OSNet: features of several scales at once, by light convolutions.

Zhou, Yang, Cavallaro and Xiang, *Omni-Scale Feature Learning for Person Re-Identification* (ICCV
2019), and the journal version with instance normalisation, *Learning Generalisable Omni-Scale
Representations for Person Re-Identification* (TPAMI 2021).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.registry import BACKBONE
from reid.structures import Batch, FeatureTokens

Norm = Literal["batch", "ibn", "ain"]
_Residual = Literal["batch", "after", "inside"]

WIDTHS = (0.25, 0.5, 0.75, 1.0)
_CHANNELS = (64, 256, 384, 512)  # of the stem and the three stages, at width 1
_SCALES = 4  # T in the paper
_BOTTLENECK = 4
_GATE = 16
# Where the residual blocks of each stage have an InstanceNorm.
_RESIDUALS: dict[Norm, tuple[tuple[_Residual, _Residual], ...]] = {
    "batch": (("batch", "batch"), ("batch", "batch"), ("batch", "batch")),
    "ibn": (("after", "after"), ("batch", "batch"), ("batch", "batch")),
    "ain": (("inside", "inside"), ("batch", "inside"), ("inside", "batch")),
}


@BACKBONE.register()
class OSNet(nn.Module):
    """OSNet with its embedding layer; it ignores the camera of an image.

    The token of the whole image is torchreid's feature of 512 numbers: the mean of the last map, a
    linear layer, BatchNorm, ReLU. Each token of the map goes through the same layers, so parts
    and whole images lie in one space. BatchNorm takes its statistics from whole images only: the
    map is normalised with the running statistics, in training too.

    Weights of torchreid convert by name (`tools/convert_weights.py`).

    Args:
        width: Share of the channels: 1.0, 0.75, 0.5 or 0.25, with 2.2, 1.3, 0.6 and 0.2 million
            parameters.
        norm: `batch` is the network of the paper. `ibn` adds InstanceNorm to the stem and, after
            the sum, to the blocks of the first stage (torchreid's `osnet_ibn`, as Pan et al., ECCV
            2018, in IBN-b). `ain` adds it to the stem and, inside the residual, to the blocks that
            the search of the journal version chose (`osnet_ain`).

    Raises:
        ValueError: The width or the norm is unknown.
    """

    def __init__(self, width: float = 1.0, norm: Norm = "batch") -> None:
        super().__init__()
        if width not in WIDTHS:
            raise ValueError(f"width: expected {', '.join(map(str, WIDTHS))}, got {width}")
        if norm not in get_args(Norm):
            raise ValueError(f"norm: expected {', '.join(get_args(Norm))}, got {norm!r}")
        channels = [round(width * count) for count in _CHANNELS]
        self.embed_dim = 512
        self.net = _Network(channels, self.embed_dim, norm)

    def forward(self, batch: Batch) -> FeatureTokens:
        """Tokens of the batch's images; the map has a sixteenth of their height and width."""
        image = batch.image
        # A CPU takes a third less time than with channels first.
        if image.device.type == "cpu":
            image = image.contiguous(memory_format=torch.channels_last)
        features = self.net.map(image)
        whole = self.net.embed(features.mean((2, 3)))
        places = self.net.embed_places(features.flatten(2).transpose(1, 2))
        return FeatureTokens(
            torch.cat((whole[:, None], places), 1), (features.shape[2], features.shape[3])
        )


class _Network(nn.Module):
    """The layers; tensors in a file are named relative to this module."""

    def __init__(self, channels: list[int], embed_dim: int, norm: Norm) -> None:
        super().__init__()
        self.stem = _ConvNorm(3, channels[0], 7, instance=norm != "batch", stride=2)
        self.stages = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for i, residuals in enumerate(_RESIDUALS[norm]):
            first, count = channels[i], channels[i + 1]
            self.stages.append(
                nn.Sequential(*map(_Block, (first, count), (count, count), residuals))
            )
            if i < 2:  # the last stage keeps its size
                self.transitions.append(_ConvNorm(count, count, 1))
        self.last = _ConvNorm(channels[-1], channels[-1], 1)
        self.fc = nn.Linear(channels[-1], embed_dim)
        self.fc_norm = nn.BatchNorm1d(embed_dim)
        self.apply(_initialize)

    def map(self, image: Tensor) -> Tensor:
        """The last map (B, C, H / 16, W / 16)."""
        feature = F.max_pool2d(F.relu(self.stem(image)), 3, stride=2, padding=1)
        for stage, transition in zip(self.stages, [*self.transitions, None], strict=True):
            feature = stage(feature)
            if transition is not None:
                feature = F.avg_pool2d(F.relu(transition(feature)), 2)
        return F.relu(self.last(feature))

    def embed(self, pooled: Tensor) -> Tensor:
        """Pooled maps (B, C) -> (B, D)."""
        # One image has no variance. `GroupedBatchNorm` handles that itself, and must be called on
        # every process, since it communicates.
        if self.training and len(pooled) == 1 and type(self.fc_norm) is nn.BatchNorm1d:
            return self.embed_places(pooled)
        return F.relu(self.fc_norm(self.fc(pooled)))

    def embed_places(self, places: Tensor) -> Tensor:
        """(..., C) -> (..., D), normalised with the running statistics."""
        norm = self.fc_norm
        embedded = self.fc(places)
        normalised = F.batch_norm(
            embedded.flatten(0, -2),
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            eps=norm.eps,
        )
        return F.relu(normalised).reshape(embedded.shape)


class _Block(nn.Module):
    """A residual of several scales: y = ReLU(x + sum over t of G(F^t(x)) * F^t(x)), section 3.2.

    F^t is t light convolutions in a row, which see 2 t + 1 pixels. They work on a quarter of the
    channels, and share one gate G.
    """

    def __init__(self, channels: int, out_channels: int, residual: _Residual) -> None:
        super().__init__()
        inner = out_channels // _BOTTLENECK
        self.reduce = _ConvNorm(channels, inner, 1)
        self.streams = nn.ModuleList(
            nn.Sequential(*(_LightConv(inner) for _ in range(scale + 1)))
            for scale in range(_SCALES)
        )
        self.gate = _Gate(inner)
        inside = residual == "inside"
        self.expand = _ConvNorm(inner, out_channels, 1, instance=inside)
        self.shortcut = (
            nn.Identity() if channels == out_channels else _ConvNorm(channels, out_channels, 1)
        )
        after = residual == "after"
        self.norm = _InstanceNorm(out_channels) if after else nn.Identity()

    def forward(self, feature: Tensor) -> Tensor:
        reduced = F.relu(self.reduce(feature))
        scales = [stream(reduced) for stream in self.streams]
        gated = [scale * self.gate(scale) for scale in scales]
        residual: Tensor = self.expand(gated[0] + gated[1] + gated[2] + gated[3])
        return F.relu(self.norm(residual + self.shortcut(feature)))


class _LightConv(nn.Module):
    """Lite 3 x 3: pointwise without bias, then depthwise, BatchNorm, ReLU (section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, feature: Tensor) -> Tensor:
        return F.relu(self.norm(self.depthwise(self.pointwise(feature))))


class _Gate(nn.Module):
    """A weight from 0 to 1 for each channel, computed from the channels' means (section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // _GATE, 1)
        self.excite = nn.Conv2d(channels // _GATE, channels, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1)."""
        means = feature.mean((2, 3), keepdim=True)
        gates: Tensor = self.excite(F.relu(self.squeeze(means))).sigmoid()
        return gates


class _InstanceNorm(nn.InstanceNorm2d):
    """InstanceNorm with weight and bias; on a CPU it leaves channels last where they are."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, feature: Tensor) -> Tensor:
        if feature.device.type == "cpu":  # GroupNorm with groups of one channel is the same
            return F.group_norm(feature, self.num_features, self.weight, self.bias, self.eps)
        return super().forward(feature)


class _ConvNorm(nn.Module):
    """A convolution without bias, and BatchNorm or InstanceNorm."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        size: int,
        *,
        instance: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, out_channels, size, stride=stride, padding=size // 2, bias=False
        )
        self.norm: nn.Module = (
            _InstanceNorm(out_channels) if instance else nn.BatchNorm2d(out_channels)
        )

    def forward(self, feature: Tensor) -> Tensor:
        normalised: Tensor = self.norm(self.conv(feature))
        return normalised


def _initialize(module: nn.Module) -> None:
    """He et al. 2015 for convolutions, a narrow normal distribution for the embedding."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
