"""The consensus of two clusterings of the same images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reid.structures import OUTLIER


class Consensus(NamedTuple):
    """A sparse matrix of old by new clusters, as a list of its entries above 0.

    Attributes:
        old: (E,) the old cluster of each entry; E is at most the number of images.
        new: (E,) the new cluster of each entry.
        weight: (E,) the entry; those of an old cluster sum to 1.
    """

    old: Tensor
    new: Tensor
    weight: Tensor


def clustering_consensus(old: Tensor, new: Tensor) -> Consensus:
    """|I_a & I_b| / |I_a or I_b| of the images of old cluster a and new cluster b, rows of sum 1.

    Zhang et al. (RLCC, CVPR 2021), section 3.2. Images that one of the two clusterings leaves out
    count in the size of their cluster in the other one.

    Args:
        old: (N,) clusters, -1 = none.
        new: (N,) clusters of the same images, -1 = none.
    """
    old_size = torch.bincount(old + 1)[1:]
    new_size = torch.bincount(new + 1)[1:]
    shared = (old != OUTLIER) & (new != OUTLIER)
    pairs, common = torch.unique(
        torch.stack((old[shared], new[shared]), 1), dim=0, return_counts=True
    )
    a, b = pairs.unbind(1)
    overlap = common.double() / (old_size[a] + new_size[b] - common)
    total = overlap.new_zeros(len(old_size)).index_add_(0, a, overlap)
    return Consensus(a.contiguous(), b.contiguous(), overlap / total[a])
