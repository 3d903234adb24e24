"""A loss that keeps the parts of an image apart."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reid.modeling.losses import Loss, select_banks
from reid.registry import LOSS
from reid.structures import Batch, Embeddings


@LOSS.register()
class PartDiversity(Loss):
    """The mean cosine of the pairs of parts of an image, from -1 / (K - 1) to 1.

    It needs no labels, and goes with any head that has parts. It is part of our working definition
    of PAT (projects/PAT); the paper's own loss was not at hand.

    Args:
        feature: Whether to compare features `before` or `after` the neck.
        num_parts: K.

    Raises:
        ValueError: The model has fewer than two parts.
    """

    def __init__(self, feature: Literal["before", "after"] = "before", num_parts: int = 0) -> None:
        super().__init__()
        if num_parts < 2:
            raise ValueError(f"needs a head with two parts or more, the model's has {num_parts}")
        self._feature = feature

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`diversity`, mean over all images, labelled or not."""
        feature = embeddings.pre if self._feature == "before" else embeddings.post
        return {"diversity": mean_part_cosine(select_banks(feature, "parts"))}


def mean_part_cosine(parts: Tensor) -> Tensor:
    """The mean cosine of two different parts of an image, over the images.

    A part that is 0 has the cosine 0 to all others, and gets no gradient. Half precision is
    computed in float32, under mixed precision too.

    Args:
        parts: (B, K, D), K of 2 or more.
    """
    parts = parts if parts.dtype == torch.float64 else parts.float()
    count = parts.shape[1]
    length = parts.norm(dim=2, keepdim=True)
    unit = parts / length.masked_fill(length < 1e-12, torch.inf)
    # The sum over all pairs is the squared length of the sum; this needs no (K, K) product, which
    # mixed precision would round.
    pairs: Tensor = unit.sum(1).square().sum(1) - unit.square().sum((1, 2))
    return pairs.mean() / (count * (count - 1))
