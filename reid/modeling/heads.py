"""Heads: tokens become normalised embeddings."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from reid.registry import HEAD
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
