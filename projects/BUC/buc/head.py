"""A head of two layers: one is trained, the layer below is clustered and tested."""

from __future__ import annotations

from typing import Annotated

from torch import nn
from torch.nn import functional as F

from reid.modeling.heads import Neck, normalize
from reid.registry import HEAD, Range
from reid.structures import Batch, Embeddings, FeatureTokens


@HEAD.register()
class EmbeddingHead(nn.Module):
    """BUC's head: e = dropout(L2(BatchNorm(W p + b))) is trained, L2(p) clustered and tested.

    Lin et al., AAAI 2019, as in the published code. The dropout follows the normalisation, so a
    training feature e is not of unit length. `post` holds e, `pre` BatchNorm's output, `unit` e
    before the dropout, and `test` L2(p), p the token of the whole image. BatchNorm's bias is
    trained.

    Args:
        backbone: Its `embed_dim` is the length of p.
        dim: D, the length of e.
        dropout: Share of e's numbers that are 0 in training; the others grow in proportion.

    Attributes:
        embed_dim: D.
        num_parts: K = 0.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: Annotated[int, Range(1, 65_536)] = 2048,
        dropout: Annotated[float, Range(0, 1, below=True)] = 0.5,
    ) -> None:
        super().__init__()
        if dim < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"expected dim of 1 or more and dropout from 0 to below 1, got {dim}, {dropout}"
            )
        self.embed_dim = dim
        self.num_parts = 0
        self.embedding = nn.Linear(int(backbone.embed_dim), dim)  # type: ignore[arg-type]
        nn.init.kaiming_normal_(self.embedding.weight, mode="fan_out")
        nn.init.zeros_(self.embedding.bias)
        self.neck = Neck(dim)
        self.neck.bias.requires_grad_(True)
        self._dropout = dropout

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """One bank (B, 1, D); `test` (B, length of p)."""
        pooled = features.tokens[:, 0]
        pre = self.neck(self.embedding(pooled))
        unit = normalize(pre)
        trained = F.dropout(unit, self._dropout, self.training)
        return Embeddings(pre[:, None], trained[:, None], unit[:, None], normalize(pooled))
