"""IICS's head: the pooled feature as it is."""

from __future__ import annotations

from torch import nn

from reid.modeling.heads import normalize
from reid.registry import HEAD
from reid.structures import Batch, Embeddings, FeatureTokens


@HEAD.register()
class PooledHead(nn.Module):
    """The token of the whole image without a neck; necks and classifiers are in the losses.

    So they are new in every stage, and the backbone alone goes on (IICS). The L2-normalised token
    is clustered and tested.

    Args:
        backbone: Its `embed_dim` is D.

    Attributes:
        embed_dim: D.
        num_parts: K = 0.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.embed_dim = int(backbone.embed_dim)  # type: ignore[arg-type]
        self.num_parts = 0

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """One bank (B, 1, D)."""
        pooled = features.tokens[:, 0].float()
        unit = normalize(pooled)
        return Embeddings(pooled[:, None], pooled[:, None], unit[:, None], unit)
