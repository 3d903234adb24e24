"""A global feature, and features of parts that attend to channels and positions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from reid.modeling.attention import Attention, build_attention
from reid.modeling.backbones import TimmBackbone
from reid.modeling.heads import Neck, normalize
from reid.registry import HEAD, ConfigError, Range
from reid.structures import Batch, Embeddings, FeatureTokens

_Dropout = Annotated[float, Range(0, 1, below=True)]


@HEAD.register()
class ABDHead(nn.Module):
    """ABD-Net's two branches, each with its own copy of a ResNet's last stage (section 3.3).

    The head takes the last stage from the backbone and copies it, so load pre-trained weights into
    the backbone first.

    Global branch: mean of the map, linear layer to D, BatchNorm, ReLU, dropout; the feature g.
    Attentive branch: the map is reduced to D channels and cut into K horizontal parts of the same
    height. `identity`, `channels` and `positions` look at each part, the same three modules at all;
    their sum goes through a 1x1 convolution (`merge`), whose mean is the feature a_k. There are no
    necks: the features before and after are the same.

    The banks are g, a_1 to a_K, in this order. The test feature joins all of them. The published
    code compares it without normalisation: set TEST.EVALUATOR.NORMALIZE to false.

    Losses can name the outputs of `head.identity`, `head.channels`, `head.positions` and
    `head.merge`, maps (B, D, H / K, W) for each part.

    Args:
        backbone: A ResNet of timm.
        dim: D.
        num_parts: K.
        attention: What the attentive branch attends to, beside the identity.
        convolutions: Put each of the three modules between convolutions: 3x3 to D / 2 channels, the
            module, 3x3, then 1x1 to D. Otherwise they see the map itself.
        dropout: Of the global feature.
        channel_dropout: Share of whole channels that are dropped before 1x1 convolutions.

    Attributes:
        embed_dim: D.
        num_parts: K.
        granularities: (K,), as tools read it that draw the parts.

    Raises:
        ValueError: The backbone is no ResNet of timm, or an option is out of its range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: Annotated[int, Range(2, 65_536)] = 1024,
        num_parts: Annotated[int, Range(1, 1024)] = 2,
        attention: Sequence[Attention] = ("channels", "positions"),
        convolutions: bool = True,
        dropout: _Dropout = 0.5,
        channel_dropout: _Dropout = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, TimmBackbone):
            raise ValueError(f"backbone: expected a TimmBackbone, got {type(backbone).__name__}")
        if dim < 2 or num_parts < 1 or not 0 <= dropout < 1 or not 0 <= channel_dropout < 1:
            raise ValueError(
                "expected dim of 2 or more, num_parts of 1 or more and dropouts from 0 to below 1, "
                f"got {dim}, {num_parts}, {dropout}, {channel_dropout}"
            )
        if not attention or len(set(attention)) < len(attention):
            raise ValueError(
                f"attention: expected channels, positions or both, got {list(attention)}"
            )
        self.embed_dim = dim
        self.num_parts = num_parts
        self.granularities = (num_parts,)
        width = backbone.embed_dim
        stage = backbone.split_last_stage()
        self.last_stages = nn.ModuleList((stage, copy.deepcopy(stage)))
        norm = Neck(dim)
        norm.bias.requires_grad_(True)
        self.global_fc = nn.Sequential(nn.Linear(width, dim), norm, nn.ReLU(), nn.Dropout(dropout))
        self.reduction = _convolution(width, dim, 1)
        self._attention = tuple(attention)
        inner = dim // 2 if convolutions else dim
        modules: dict[str, nn.Module] = {"identity": nn.Identity()}
        modules.update((kind, build_attention(kind, inner)) for kind in attention)
        for name, module in modules.items():
            if convolutions:
                module = AttentionBlock(module, dim, inner, channel_dropout)
            self.add_module(name, module)
        self.merge = nn.Sequential(nn.Dropout2d(channel_dropout), nn.Conv2d(dim, dim, 1))
        for layer in (self.global_fc, self.reduction, self.merge, *self._looks()):
            _start(layer)

    def _looks(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in ("identity", *self._attention)]

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + K, D); the test feature has (1 + K) D numbers.

        Raises:
            ConfigError: K does not divide the rows of the map.
        """
        map_ = features.tokens[:, 1:].transpose(1, 2)
        map_ = map_.reshape(*map_.shape[:2], *features.grid)
        whole, attentive = (stage(map_) for stage in self.last_stages)
        pre = [self._global_feature(whole), *self._part_features(self.reduction(attentive))]
        banks = torch.stack(pre, 1).float()
        return Embeddings(banks, banks, normalize(banks), normalize(banks.flatten(1)))

    def _global_feature(self, map_: Tensor) -> Tensor:
        feature: Tensor = self.global_fc(map_.mean((2, 3)))
        return feature

    def _part_features(self, map_: Tensor) -> list[Tensor]:
        rows = map_.shape[2]
        if rows % self.num_parts:
            fitting = [n for n in range(1, rows + 1) if not rows % n]
            raise ConfigError(
                f"model.head.num_parts: expected a divisor of the {rows} rows of the backbone's "
                f"map ({', '.join(map(str, fitting))}), got {self.num_parts}; another height in "
                "INPUT.SIZE gives other rows"
            )
        looks = self._looks()
        return [
            self.merge(torch.stack([look(part) for look in looks]).sum(0)).mean((2, 3))
            for part in map_.chunk(self.num_parts, 2)
        ]


class AttentionBlock(nn.Module):
    """A module between convolutions (DANet's head).

    3x3 convolution, BatchNorm and ReLU; the module; 3x3 convolution, BatchNorm and ReLU; dropout of
    channels and a 1x1 convolution.

    Args:
        attention: The module, for maps with `inner` channels.
        channels: Of the map that comes in and of the one that goes out.
        inner: Channels between.
        dropout: Share of the channels that are dropped.
    """

    def __init__(self, attention: nn.Module, channels: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.reduce = _convolution(channels, inner, 3)
        self.attention = attention
        self.refine = _convolution(inner, inner, 3)
        self.expand = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(inner, channels, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        looked: Tensor = self.attention(self.reduce(feature))
        result: Tensor = self.expand(self.refine(looked))
        return result


def _convolution(channels: int, out: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


def _start(module: nn.Module) -> None:
    """Gives new layers the initial weights of the published code."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, Neck | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
