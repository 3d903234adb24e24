"""Heads: tokens become normalised embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.registry import HEAD, ConfigError, Range
from reid.structures import Batch, Embeddings, FeatureTokens


class Neck(nn.BatchNorm1d):
    """BatchNorm whose bias stays 0 (BNNeck: Luo et al., *Bag of Tricks*, CVPRW 2019).

    A training batch of one image has no variance; it is normalised with the running statistics and
    does not move them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.bias.requires_grad_(False)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D) -> (B, D), in float32."""
        feature = feature.float()
        if self.training and len(feature) == 1:
            return F.batch_norm(
                feature,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                eps=self.eps,
            )
        return super().forward(feature)


def normalize(feature: Tensor) -> Tensor:
    """Unit vectors along the last axis, in float32."""
    return F.normalize(feature.float(), dim=-1)


@HEAD.register()
class BNNeckHead(nn.Module):
    """The token of the whole image, BatchNorm without bias, L2 normalisation; no parts.

    Args:
        backbone: Its `embed_dim` is D.
        neck_feature: The test feature is the one `after` the neck (BoT) or `before` it (TransReID's
            configurations).

    Attributes:
        embed_dim: D.
        num_parts: K = 0.
    """

    def __init__(
        self, backbone: nn.Module, neck_feature: Literal["before", "after"] = "after"
    ) -> None:
        super().__init__()
        self._neck_feature = neck_feature
        self.embed_dim = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.num_parts = 0
        self.neck = Neck(self.embed_dim)

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """One bank (B, 1, D)."""
        pre = features.tokens[:, 0]
        post = self.neck(pre)
        unit = normalize(post if self._neck_feature == "after" else pre)
        return Embeddings(pre.float()[:, None], post[:, None], unit[:, None], unit)


@HEAD.register()
class BNNeckStripeHead(nn.Module):
    """The token of the whole image, and the means of horizontal stripes of the map.

    Each has its own BatchNorm without bias. Stripe j of n covers the rows floor(j H / n) to
    ceil((j + 1) H / n) - 1 of the map, top to bottom: if n does not divide the H rows, neighbours
    share a row (torch's adaptive pooling; the parts of PCB, Sun et al., ECCV 2018, and of PPLR,
    Cho et al., CVPR 2022). The test feature is global.

    Args:
        backbone: Its `embed_dim` is D.
        num_stripes: n.

    Attributes:
        embed_dim: D.
        num_parts: K = n.
        granularities: (n,), as tools read it that draw the parts.

    Raises:
        ValueError: There is no stripe.
    """

    def __init__(
        self, backbone: nn.Module, num_stripes: Annotated[int, Range(1, 1024)] = 3
    ) -> None:
        super().__init__()
        if num_stripes < 1:
            raise ValueError(
                f"num_stripes: expected 1 or more, got {num_stripes}; BNNeckHead has no parts"
            )
        self.embed_dim = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.num_parts = num_stripes
        self.granularities = (num_stripes,)
        self.neck = Neck(self.embed_dim)
        self.part_necks = nn.ModuleList(Neck(self.embed_dim) for _ in range(num_stripes))

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + K, D).

        Raises:
            ConfigError: The map has fewer rows than there are stripes.
        """
        pre = [features.tokens[:, 0], *pool_stripes(features, self.num_parts)]
        necks = (self.neck, *self.part_necks)
        post = torch.stack([neck(bank) for neck, bank in zip(necks, pre, strict=True)], 1)
        unit = normalize(post)
        return Embeddings(torch.stack(pre, 1).float(), post, unit, unit[:, 0])


@HEAD.register()
class StripeHead(nn.Module):
    """PCB's features: the means of horizontal stripes of the map, without necks.

    Sun et al., *Beyond Part Models* (ECCV 2018), as st-ReID (AAAI 2019) uses it: in training each
    number of a stripe's feature is dropped with a chance; in tests the stripes are normalised one
    by one and joined, so that the cosine of two images is the mean of their stripes' cosines. Bank
    0, which no part of PCB uses, is the token of the whole image. Stripes that the map's rows
    cannot be shared out to evenly share rows, see `BNNeckStripeHead`.

    Args:
        backbone: Its `embed_dim` is D.
        num_stripes: K.
        dropout: Share of the stripes' numbers that are dropped in training.

    Attributes:
        embed_dim: D.
        num_parts: K.
        granularities: (K,), as tools read it that draw the parts.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_stripes: Annotated[int, Range(1, 1024)] = 6,
        dropout: Annotated[float, Range(0, 1, below=True)] = 0.5,
    ) -> None:
        super().__init__()
        if num_stripes < 1 or not 0 <= dropout < 1:
            raise ValueError(
                "expected num_stripes of 1 or more and dropout from 0 to below 1, got "
                f"{num_stripes}, {dropout}"
            )
        self.embed_dim = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.num_parts = num_stripes
        self.granularities = (num_stripes,)
        self._dropout = dropout

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + K, D); the test feature (B, K * D).

        Raises:
            ConfigError: The map has fewer rows than there are stripes.
        """
        stripes = torch.stack(pool_stripes(features, self.num_parts), 1).float()
        trained = F.dropout(stripes, self._dropout, self.training)
        pre = torch.cat((features.tokens[:, :1].float(), trained), 1)
        test = normalize(normalize(stripes).flatten(1))
        return Embeddings(pre, pre, normalize(pre), test)


def pool_stripes(features: FeatureTokens, count: int) -> list[Tensor]:
    """The means (B, D) of horizontal stripes of the map, top to bottom; see `BNNeckStripeHead`.

    Args:
        features: Their grid has H rows.
        count: n.

    Raises:
        ConfigError: n is more than H.
    """
    height, width = features.grid
    if count > height:
        raise ConfigError(
            f"model.head.num_stripes: expected at most {height}, the rows of the backbone's map, "
            f"got {count}; a larger image gives more rows"
        )
    tokens = features.tokens[:, 1:].reshape(len(features.tokens), height, width, -1)
    # Slices, since the gradient of torch's adaptive pooling is not repeatable on a GPU.
    return [
        tokens[:, j * height // count : -(-(j + 1) * height // count)].mean((1, 2))
        for j in range(count)
    ]
