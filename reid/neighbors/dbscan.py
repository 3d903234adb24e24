"""DBSCAN on a sparse graph of distances."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from numba import njit

from reid.neighbors.kernels import Floats, Indices, Labels, Offsets

TIE_TOLERANCE = 1e-6
"""Distances up to eps + this count as within eps.

The local query expansion averages k2 rows, so that distances of simple fractions are frequent: with
k2 = 6, two images that share 4 of 6 rows lie at exactly 0.5, the usual eps. There the rounding of
the last bit would decide. Distances are sums in double precision, rounded once to single precision
(6e-8), so that this tolerance is above any rounding and far below any difference that means
something.
"""


def dbscan(
    distances: scipy.sparse.csr_matrix,
    eps: float,
    min_samples: int,
    tolerance: float = TIE_TOLERANCE,
) -> Labels:
    """DBSCAN (Ester et al., KDD 1996) on a sparse graph of distances.

    The labels are scikit-learn's: a point counts among its own neighbours, clusters are numbered
    by their first core point in index order, and a border point goes to the first cluster that
    reaches it.

    Args:
        distances: (N, N) symmetric CSR; what is not stored is far away. Zeros count as stored.
        eps: Largest distance of neighbours.
        min_samples: Neighbours that make a core point, itself included.
        tolerance: Ties count as within eps: distances up to `eps + tolerance` are neighbours
            (see `TIE_TOLERANCE`).

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
    return _dbscan(
        distances.indptr.astype(np.int64, copy=False),
        distances.indices,
        distances.data,
        np.float32(eps + tolerance),
        min_samples,
    )


@njit(cache=True)
def _dbscan(
    indptr: Offsets, indices: Indices, data: Floats, eps: np.float32, min_samples: int
) -> Labels:
    count = len(indptr) - 1
    core = np.zeros(count, np.bool_)
    for i in range(count):
        near = 1  # itself, stored or not
        for place in range(indptr[i], indptr[i + 1]):
            near += data[place] <= eps and indices[place] != i
        core[i] = near >= min_samples
    labels = np.full(count, -1, np.int64)
    stack = np.empty(count, np.int64)
    cluster = 0
    for seed in range(count):
        if labels[seed] != -1 or not core[seed]:
            continue
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
        cluster += 1
    return labels
