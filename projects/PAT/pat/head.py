"""Parts that learned prototypes find in the map, by our working definition of PAT."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from reid.modeling.heads import Neck, normalize
from reid.registry import HEAD, Range
from reid.structures import Batch, Embeddings, FeatureTokens


@HEAD.register()
class PartPrototypeHead(nn.Module):
    """The whole image, and K parts, each where a learned prototype looks in the map.

    Our working definition after the abstract of PAT (Li et al., CVPR 2021), not the paper's: its
    text and code were not at hand.

    - Pixels: a linear layer brings the map's N positions to d numbers; there is no position vector.
    - Encoder: one transformer layer, norms after the sums, x <- LN(x + A(x, x, x)), then
      x <- LN(x + W2 ReLU(W1 x)). Its output is e; its mean over the positions is the feature of the
      whole image, g.
    - Decoder: prototypes P (K, d) look at each other, r = LN(P + A(P, P, P)). Each has a mask over
      the positions, m = softmax((W_q r) (W_k e)^T / sqrt(d)), with one head. A part is
      f = LN(v + V2 ReLU(V1 v)), where v = m (W_v e): nothing is added from the prototype itself.
    - Each of g and f_1 to f_K has its own BatchNorm without bias. The test feature joins them after
      the BatchNorms, (1 + K) d numbers, then normalised.

    Any backbone with a map or with patches will do, with any number of positions. There is no
    dropout.

    Args:
        backbone: Its `embed_dim` is the width of the map.
        num_parts: K.
        dim: d.
        num_heads: Heads of the encoder's attention, and of the prototypes' attention to each other.
        hidden_dim: Rows of W1 and V1.

    Attributes:
        embed_dim: d.
        num_parts: K.

    Raises:
        ValueError: A number is below 1, or `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_parts: Annotated[int, Range(1, 1024)] = 6,
        dim: Annotated[int, Range(1, 16_384)] = 256,
        num_heads: Annotated[int, Range(1, 1024)] = 8,
        hidden_dim: Annotated[int, Range(1, 65_536)] = 2048,
    ) -> None:
        super().__init__()
        if min(num_parts, dim, num_heads, hidden_dim) < 1:
            raise ValueError(
                "expected num_parts, dim, num_heads and hidden_dim of 1 or more, got "
                f"{num_parts}, {dim}, {num_heads}, {hidden_dim}"
            )
        if dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of dim, which is {dim}, got {num_heads}"
            )
        self.embed_dim = dim
        self.num_parts = num_parts
        self.reduce = nn.Linear(int(backbone.embed_dim), dim)  # type: ignore[arg-type]
        self.encoder = nn.TransformerEncoderLayer(
            dim, num_heads, hidden_dim, dropout=0.0, batch_first=True
        )
        self.prototypes = nn.Parameter(torch.randn(num_parts, dim))
        self.prototype_attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.prototype_norm = nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.widen = nn.Linear(dim, hidden_dim)
        self.narrow = nn.Linear(hidden_dim, dim)
        self.part_norm = nn.LayerNorm(dim)
        self.neck = Neck(dim)
        self.part_necks = nn.ModuleList(Neck(dim) for _ in range(num_parts))

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + K, d); the test feature has (1 + K) d numbers."""
        pixels = self.encode(features)
        parts, _ = self.find_parts(pixels)
        pre = torch.cat((pixels.mean(1, keepdim=True), parts), 1).float()
        necks = (self.neck, *self.part_necks)
        post = torch.stack([neck(bank) for neck, bank in zip(necks, pre.unbind(1), strict=True)], 1)
        return Embeddings(pre, post, normalize(post), normalize(post.flatten(1)))

    def encode(self, features: FeatureTokens) -> Tensor:
        """The positions (B, N, d) as the encoder gives them, in the order of the map's rows."""
        pixels: Tensor = self.encoder(self.reduce(features.tokens[:, 1:]))
        return pixels

    def find_parts(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The parts (B, K, d), and the masks (B, K, N) that they were taken with.

        Args:
            pixels: The result of `encode`.
        """
        start = self.prototypes[None]
        seen, _ = self.prototype_attention(start, start, start, need_weights=False)
        query = self.query(self.prototype_norm(start + seen)) / math.sqrt(self.embed_dim)
        mask = (query @ self.key(pixels).transpose(1, 2)).softmax(2)
        taken = mask @ self.value(pixels)
        return self.part_norm(taken + self.narrow(self.widen(taken).relu())), mask
