"""How far two kinds of features agree about the neighbours of an image."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from reid.neighbors.kernels import Floats, Indices
from reid.neighbors.search import nearest_neighbors
from reid.structures import ProgressBar


def other_neighbors(features: Tensor, k: int, *, progress: ProgressBar | None = None) -> Indices:
    """Exact nearest other vectors of N vectors, by Euclidean distance.

    A vector is left out of its own list by its index, so duplicates of it stay in.

    Args:
        features: (N, D), finite.
        k: Length of the lists; N - 1 if there are fewer others.
        progress: Called with (images' worth of pairs done, N).

    Returns:
        (N, min(k, N - 1)) int32, nearest first.

    Raises:
        ValueError: `k` is below 1, there is no vector, or a feature is not finite.
    """
    if k < 1:
        raise ValueError(f"k: expected 1 or more, got {k}")
    found = nearest_neighbors(features, min(k + 1, max(len(features), 1)), progress=progress)
    others: Indices = found[:, 1:]  # the vector itself is in first place
    return others


def list_agreement(one: Indices, other: Indices) -> Floats:
    """The share |A & B| / |A or B| of each pair of neighbour lists.

    Args:
        one: (N, k) indices; none comes twice in a list.
        other: (N, k) likewise.

    Returns:
        (N,) single precision, 0 to 1; 1 for two empty lists.
    """
    both = np.sort(np.concatenate((one, other), 1), 1)
    shared = (both[:, 1:] == both[:, :-1]).sum(1)
    union = both.shape[1] - shared
    agreement: Floats = np.where(union > 0, shared / np.maximum(union, 1), 1).astype(np.float32)
    return agreement
