"""The pose-view decoder: learned queries that look at the tokens of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DecoderLayer(nn.Module):
    """One layer: queries look at each other, then at the image, then pass a small network.

    Each of the three is followed by a LayerNorm (Vaswani et al. 2017, with the places of dropout
    and of the queries' embedding as in DETR, Carion et al., ECCV 2020).

    Args:
        dim: D.
        num_heads: Of both attentions.
        width: Of the hidden layer.
        dropout: Of attention weights and of all results.
        residual: Add the input of the small network to its result. The published code adds the
            result to itself.
    """

    def __init__(
        self, dim: int, num_heads: int, width: int, dropout: float, residual: bool
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, width)
        self.linear2 = nn.Linear(width, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self._dropout = dropout
        self._residual = residual

    def forward(self, view: Tensor, query: Tensor, memory: Tensor) -> Tensor:
        """Views (B, Q, D), embeddings of the queries (1, Q, D), tokens (B, N, D) -> (B, Q, D)."""
        asked = view + query
        among = self.self_attn(asked, asked, view, need_weights=False)[0]
        view = self.norm1(view + self._drop(among))
        seen = self.cross_attn(view + query, memory, memory, need_weights=False)[0]
        view = self.norm2(view + self._drop(seen))
        result = self.linear2(self._drop(F.relu(self.linear1(view))))
        normed: Tensor = self.norm3((view if self._residual else result) + self._drop(result))
        return normed

    def _drop(self, value: Tensor) -> Tensor:
        return F.dropout(value, self._dropout, self.training)


class Decoder(nn.Module):
    """Learned queries and layers; PFD, section "Pose-view Decoder".

    Args:
        count: Queries.
        dim: D.
        depth: Layers.
        num_heads: See `DecoderLayer`.
        width: See `DecoderLayer`.
        dropout: See `DecoderLayer`.
        residual: See `DecoderLayer`.
    """

    def __init__(
        self,
        count: int,
        dim: int,
        depth: int,
        num_heads: int,
        width: int,
        dropout: float,
        residual: bool,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, dim))
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, width, dropout, residual) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        for parameter in self.layers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, memory: Tensor) -> Tensor:
        """Tokens (B, N, D) -> views (B, Q, D)."""
        query = self.queries[None]
        view = torch.zeros_like(query).expand(len(memory), -1, -1)
        for layer in self.layers:
            view = layer(view, query, memory)
        views: Tensor = self.norm(view)
        return views
