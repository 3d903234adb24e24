"""Distances inside a batch, its hardest pairs, and the triplet loss of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reid.structures import OUTLIER


def euclidean_distances(feature: Tensor) -> Tensor:
    """Euclidean distances (B, B) of features (B, D) in float32, 1e-6 or more.

    Computed in float32 under mixed precision too: half precision loses small distances.
    """
    with torch.autocast(feature.device.type, enabled=False):
        squared = feature.square().sum(1)
        return (squared[:, None] + squared - 2 * feature @ feature.T).clamp(min=1e-12).sqrt()


def hardest_pairs(distance: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's farthest image of its label and nearest image of another.

    Args:
        distance: (B, B).
        label: (B,) int64; -1 = not labelled, neither an anchor nor a positive nor a negative.

    Returns:
        `positive` and `negative` (B,) int64: places in the batch; an image may be its own positive.
        `valid` (B,): labelled, and a negative exists.
    """
    distance, labelled = distance.detach(), label != OUTLIER
    same = label[:, None] == label
    others = ~same & labelled
    positive = distance.masked_fill(~same, -torch.inf).argmax(1)
    negative = distance.masked_fill(~others, torch.inf).argmin(1)
    return positive, negative, labelled & others.any(1)


def hardest_distances(feature: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's distances to the farthest image of its label and the nearest of another.

    Computed in float32 under mixed precision too: half precision loses small distances.

    Args:
        feature: (B, D) float32.
        label: (B,) int64; -1 = not labelled, neither an anchor nor a positive nor a negative.

    Returns:
        `positive` (B,): Euclidean distance to the farthest image of the same label, itself
        included. `negative` (B,). `valid` (B,): labelled, and a negative exists.
    """
    distance = euclidean_distances(feature)
    labelled = label != OUTLIER
    same = label[:, None] == label
    others = ~same & labelled
    positive = distance.masked_fill(~same, -torch.inf).amax(1)
    negative = distance.masked_fill(~others, torch.inf).amin(1)
    return positive, negative, labelled & others.any(1)


def batch_hard_triplet(feature: Tensor, label: Tensor, margin: float | None = None) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., arXiv:1703.07737, eq. 5).

    Args:
        feature: (B, D) float32.
        label: (B,) int64; -1 = left out.
        margin: Margin of the hinge; None: soft margin.

    Returns:
        Mean over the anchors that have a negative; 0, with a gradient of 0, if there are none.
    """
    positive, negative, valid = hardest_distances(feature, label)
    difference = torch.where(valid, positive - negative, torch.zeros_like(positive))
    loss = F.softplus(difference) if margin is None else F.relu(difference + margin)
    return torch.where(valid, loss, torch.zeros_like(loss)).sum() / valid.sum().clamp(min=1)
