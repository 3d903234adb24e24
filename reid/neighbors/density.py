"""DBSCAN on a sparse graph of distances."""

from __future__ import annotations

import numba
import numpy as np
from numba import njit, prange

from reid.neighbors.kernels import Flags, Floats, Indices, Labels, Offsets, run_in_pieces
from reid.neighbors.sparse import Compressed

TIE_TOLERANCE = 1e-6
"""Distances up to eps + this count as within eps.

The local query expansion averages k2 rows, so distances are often simple fractions: with k2 = 6,
two images that share 4 of 6 rows have a distance of exactly 0.5, the usual eps. There the rounding
of the last bit would decide. Distances are sums in double precision, rounded once to single
precision (6e-8): this tolerance is above any rounding error, and far below any difference that
matters.
"""


def dbscan(
    distances: Compressed,
    eps: float,
    min_samples: int,
    tolerance: float = TIE_TOLERANCE,
    *,
    always_itself: bool = True,
) -> Labels:
    """DBSCAN (Ester et al., KDD 1996) on a sparse graph of distances.

    The labels are scikit-learn's: a point counts among its own neighbours, clusters are numbered
    by their first core point in index order, and a border point goes to the first cluster that
    reaches it.

    Args:
        distances: (N, N) symmetric, by rows, as CSR or `Rows`; pairs that are not stored are far
            apart. Stored zeros count.
        eps: Largest distance of neighbours.
        min_samples: Neighbours that make a core point, itself included.
        tolerance: Images at a distance of up to `eps + tolerance` are neighbours, so that ties
            count (see `TIE_TOLERANCE`).
        always_itself: A point is always its own neighbour. False: only if its stored distance to
            itself is within eps.

    Returns:
        (N,) int64 clusters from 0; -1 = outlier.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not eps > 0 or min_samples < 1 or not tolerance >= 0:
        raise ValueError(
            "expected eps above 0, min_samples of 1 or more and tolerance of 0 or more, got "
            f"{eps}, {min_samples}, {tolerance}"
        )
    count = distances.shape[0]
    graph = distances.indptr.astype(np.int64, copy=False), distances.indices, distances.data
    largest = np.float32(eps + tolerance)
    core, labels = np.empty(count, np.bool_), np.full(count, -1, np.int64)
    operations = float(distances.indptr[-1]) / max(count, 1)
    run_in_pieces(_find_core, count, operations, *graph, largest, min_samples,
                  always_itself, core)  # fmt: skip
    stack, clusters = np.empty(count, np.int64), np.zeros(1, np.int64)
    run_in_pieces(
        _grow_clusters, count, 4 * operations * numba.get_num_threads(),
        *graph, largest, core, stack, clusters, labels,
    )  # fmt: skip
    return labels


@njit(parallel=True, cache=True)
def _find_core(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    data: Floats,
    eps: np.float32,
    min_samples: int,
    always_itself: bool,
    core: Flags,
) -> None:
    for i in prange(start, stop):
        near = 1 if always_itself else 0
        for place in range(indptr[i], indptr[i + 1]):
            near += data[place] <= eps and not (always_itself and indices[place] == i)
        core[i] = near >= min_samples


@njit(cache=True)
def _grow_clusters(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    data: Floats,
    eps: np.float32,
    core: Flags,
    stack: Labels,
    clusters: Labels,
    labels: Labels,
) -> None:
    """Grows a new cluster from each core point that has no label yet."""
    for seed in range(start, stop):
        if labels[seed] != -1 or not core[seed]:
            continue
        cluster = clusters[0]
        labels[seed] = cluster
        stack[0] = seed
        depth = 1
        while depth:
            depth -= 1
            i = stack[depth]
            for place in range(indptr[i], indptr[i + 1]):
                j = indices[place]
                if data[place] <= eps and labels[j] == -1:
                    labels[j] = cluster
                    if core[j]:
                        stack[depth] = j
                        depth += 1
        clusters[0] += 1
