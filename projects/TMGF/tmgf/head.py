"""The dual-branch head: a global feature and features of horizontal parts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from reid.modeling.heads import Neck, normalize
from reid.modeling.vit import ViT
from reid.registry import HEAD
from reid.structures import Batch, Embeddings, FeatureTokens


@HEAD.register()
class TMGFHead(nn.Module):
    """Branches with their own last layer, each cut into horizontal parts (TMGF, section 3.2).

    The head takes the last layer and the final norm from the backbone and copies them, so load
    pre-trained weights into the backbone first. The map of branch i is average-pooled into
    K_i stripes, top to bottom (equation 4); parts are numbered branch after branch. If K_i does not
    divide the rows, stripes differ by one row, and every row is used. The global feature is made of
    the branches' class tokens (equation 5). Each feature has its own BatchNorm.

    Args:
        backbone: A ViT, such as IBNViT.
        granularities: K_i of each branch; empty: no parts, only the class token (TMGF1).
        duplicate_layer: Each branch has its own copy of the last layer; otherwise all share one
            (TMGF4). A single branch has nothing to copy.
        global_fusion: Mean of the branches' class tokens, or only the first or the second (TMGF5,
            TMGF6).

    Attributes:
        embed_dim: D.
        num_parts: K, the sum of the K_i.
        granularities: K_i of each branch.

    Raises:
        ValueError: Options do not fit each other or the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        granularities: Sequence[int] = (2, 3),
        duplicate_layer: bool = True,
        global_fusion: Literal["mean", "first", "second"] = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(backbone, ViT):
            raise ValueError(f"backbone: expected a ViT, got {type(backbone).__name__}")
        rows = backbone.grid[0]
        if granularities and not 1 <= min(granularities) <= max(granularities) <= rows:
            raise ValueError(
                f"granularities: expected 1 to {rows} stripes, the rows of the tokens' grid, got "
                f"{list(granularities)}"
            )
        copies = len(granularities) if duplicate_layer and len(granularities) > 1 else 1
        if global_fusion == "second" and copies < 2:
            raise ValueError("global_fusion: second needs two branches with their own last layer")
        self.embed_dim = backbone.embed_dim
        self.num_parts = sum(granularities)
        self.granularities = tuple(granularities)
        self._global_fusion = global_fusion
        block, norm = backbone.split_last_layer()
        self._last_layer = len(backbone.net.blocks)
        self.branches = nn.ModuleList(
            nn.Sequential(copy.deepcopy(block), copy.deepcopy(norm)) for _ in range(copies)
        )
        self.neck = Neck(self.embed_dim)
        self.part_necks = nn.ModuleList(Neck(self.embed_dim) for _ in range(self.num_parts))

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """Banks (B, 1 + K, D) of the tokens before the last layer; the test feature is global."""
        outputs = [branch(features.tokens) for branch in self.branches]
        parts = [
            stripe.mean((1, 2))
            for number, count in enumerate(self.granularities)
            for stripe in _token_map(outputs[number % len(outputs)], features.grid).tensor_split(
                count, 1
            )
        ]
        pre = [self._fuse([output[:, 0] for output in outputs]), *parts]
        necks = (self.neck, *self.part_necks)
        post = torch.stack([neck(bank) for neck, bank in zip(necks, pre, strict=True)], 1)
        unit = normalize(post)
        return Embeddings(torch.stack(pre, 1).float(), post, unit, unit[:, 0])

    def _fuse(self, class_tokens: list[Tensor]) -> Tensor:
        if self._global_fusion == "first":
            return class_tokens[0]
        if self._global_fusion == "second":
            return class_tokens[1]
        return torch.stack(class_tokens).mean(0)


def _token_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map (B, h, w, D) of the tokens after the class token."""
    return tokens[:, 1:].reshape(tokens.shape[0], *grid, -1)
