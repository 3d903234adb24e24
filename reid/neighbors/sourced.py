"""The Jaccard distance of test-time re-ranking, and how far images are from a labelled source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reid.neighbors.jaccard import by_columns, encode_neighbors, half_length, jaccard_of_rows
from reid.neighbors.kernels import Doubles, as_rows
from reid.neighbors.search import (
    Search,
    approximate_neighbors,
    farthest_distances,
    nearest_neighbors,
)
from reid.structures import ProgressBar, finite_rows, part_of_progress

if TYPE_CHECKING:
    import scipy.sparse

_ROWS = 1024
_SOURCE_ROWS = 8192


@dataclass(frozen=True)
class SparseDistances:
    """Distances among N images, of which the largest are not stored.

    Attributes:
        graph: (N, N) float32 CSR, symmetric, with sorted columns and the distance of each image to
            itself.
        far: Pairs i, j that are not stored have the distance far + push_i + push_j, or any distance
            above what they were cut at.
        push: (N,).
    """

    graph: scipy.sparse.csr_matrix
    far: float
    push: Doubles

    @property
    def least_missing(self) -> float:
        """A bound: no pair that is not stored is nearer, unless the distances were cut."""
        two = np.partition(self.push, 1)[:2] if len(self.push) > 1 else 2 * self.push
        return self.far + float(two.sum())


def reranked_jaccard(
    features: Tensor,
    k1: int = 20,
    k2: int = 6,
    *,
    push: Doubles | None = None,
    source_weight: float = 0.0,
    max_distance: float = np.inf,
    search: Search = "exact",
    progress: ProgressBar | None = None,
) -> SparseDistances:
    """The clustering distance of SSG (Fu et al., ICCV 2019) and MMT (Ge et al., ICLR 2020).

    It is the Jaccard distance J of the published test-time re-ranking: lists of k1 + 1 images (the
    image itself first), half lists of round(k1 / 2) + 1, and weights exp(-d) where d is the squared
    Euclidean distance divided by the largest of its row. With a source,

        distance_ij = (1 - source_weight) J_ij + source_weight (g_i + g_j),

    where g says how far each image is from the source (`source_push`). It may exceed 1, and that
    of an image to itself is 2 source_weight g_i. Pairs with J = 1 are not stored.

    Weights are kept in single precision and summed in double. SSG's code holds all of it in half
    precision, which moves single entries by up to 0.06.

    Args:
        features: (N, D), of unit length.
        k1: Length of the neighbour lists without the image itself; at most N - 1 count.
        k2: Entries of the list whose weights are averaged.
        push: (N,) g; None: 0.
        source_weight: lambda, from 0 to below 1.
        max_distance: Pairs may be left out whose distance is larger; saves memory.
        search: `exact`, or one of `approximate_neighbors`.
        progress: Called with (images' worth of work done, N).

    Raises:
        ValueError: An argument is out of its range or has a wrong shape, or a feature is not
            finite.
    """
    if k1 < 1 or k2 < 1 or not 0 <= source_weight < 1:
        raise ValueError(
            "expected k1 and k2 of 1 or more and source_weight from 0 to below 1, got "
            f"{k1}, {k2}, {source_weight}"
        )
    rows = as_rows(features)
    count = len(rows)
    if push is not None and push.shape != (count,):
        raise ValueError(f"push: expected the shape {(count,)}, got {push.shape}")
    searching, measuring = (
        part_of_progress(progress, count, *part) for part in ((0, 0.5), (0.5, 1))
    )
    length = min(k1 + 1, count)
    k = min(max(length, k2), count)
    if search == "exact":
        neighbors = nearest_neighbors(features, k, progress=searching)
    else:
        neighbors = approximate_neighbors(features, k, search, progress=searching)
    farthest = farthest_distances(features, progress=measuring)
    half = half_length(k1, count)
    encoding = encode_neighbors(rows, neighbors, length, half, k2, farthest, squared=False)
    graph = jaccard_of_rows(
        encoding, by_columns(encoding), min(1.0, max_distance / (1 - source_weight))
    )
    if push is None or not source_weight:
        return SparseDistances(graph, 1.0, np.zeros(count))
    pushed = source_weight * push
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        part = slice(graph.indptr[start], graph.indptr[stop])
        own = np.repeat(pushed[start:stop], np.diff(graph.indptr[start : stop + 1]))
        graph.data[part] = (
            (1 - source_weight) * graph.data[part].astype(np.float64)
            + own
            + pushed[graph.indices[part]]
        )
    return SparseDistances(graph, 1 - source_weight, pushed)


def source_push(features: Tensor, source: Tensor) -> Doubles:
    """How far each image is from its nearest image of a source: SSG's source term g.

    g_i = min over s of (1 - exp(-|a_i - s|^2)), divided by its largest value. Scores exist in
    blocks of 1024 x 8192 only; the nearest image's distance is then computed in double precision.

    Args:
        features: (N, D) of the images, of unit length.
        source: (M, D) of the source's images, of unit length.

    Returns:
        (N,) from 0 to 1; all 0 if every image lies on one of the source.

    Raises:
        ValueError: The source is empty, its features have another length than the images', or a
            feature is not finite.
    """
    as_rows(features)
    if source.ndim != 2 or not len(source) or source.shape[1] != features.shape[1]:
        raise ValueError(
            f"source: expected features (M, {features.shape[1]}) with M > 0, as long as the "
            f"images', got {tuple(source.shape)}"
        )
    if not bool(finite_rows(source).all()):
        raise ValueError("source: expected finite features, got NaN or infinity")
    ours, theirs = features.detach().float(), source.detach().to(features.device).float()
    half_norms = theirs.square().sum(1) / 2
    squared = torch.empty(len(ours), dtype=torch.float64, device=ours.device)
    for start in range(0, len(ours), _ROWS):
        block = ours[start : start + _ROWS]
        best = block.new_full((len(block),), -torch.inf)
        nearest = torch.zeros(len(block), dtype=torch.int64, device=block.device)
        for first in range(0, len(theirs), _SOURCE_ROWS):
            other = slice(first, first + _SOURCE_ROWS)
            scores, places = (block @ theirs[other].T - half_norms[other]).max(1)
            nearest = torch.where(scores > best, first + places, nearest)
            best = torch.maximum(best, scores)
        difference = block.double() - theirs[nearest].double()
        squared[start : start + _ROWS] = difference.square().sum(1)
    away = -torch.expm1(-squared)
    found: Doubles = (away / away.max().clamp(min=1e-300)).cpu().numpy()
    return found
