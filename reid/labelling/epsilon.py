"""Chooses DBSCAN's eps: the one whose clusters have the best silhouette."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from reid.neighbors import Labels, dbscan
from reid.structures import OUTLIER

CANDIDATES = tuple(round(0.025 * step, 3) for step in range(4, 33))
"""0.1 to 0.8. Below, hardly any two images of a person are neighbours; above, all join."""


@dataclass(frozen=True)
class ChosenEps:
    """The chosen eps, and the candidates it was chosen from.

    Attributes:
        eps: The chosen value.
        silhouettes: Mean silhouette of each candidate's clusters.
        clusters: (N,) int64, the clusters of the chosen eps; -1 = outlier.
    """

    eps: float
    silhouettes: Mapping[float, float]
    clusters: Labels


def choose_eps(
    distances: scipy.sparse.csr_matrix,
    min_samples: int,
    candidates: Sequence[float] = CANDIDATES,
) -> ChosenEps:
    """The eps whose DBSCAN clusters have the largest mean silhouette; of equal ones the smallest.

    If eps is too small, most images are outliers, which count 0; if it is too large, clusters hold
    images that are far from each other. This works for any number of images per person. SSG's rule
    does not (Fu et al., *Self-similarity Grouping*, ICCV 2019): its eps is the mean of the 0.16 %
    smallest distances of all pairs, which fits only sets of a certain size.

    Args:
        distances: (N, N) symmetric CSR of distances from 0 to 1; pairs that are not stored have
            distance 1.
        min_samples: As in `dbscan`.
        candidates: Values of eps to try, ascending.

    Raises:
        ValueError: There is no candidate.
    """
    if not candidates:
        raise ValueError("candidates: expected one or more values of eps")
    silhouettes: dict[float, float] = {}
    best, most, found = candidates[0], (-1, -1.0), np.empty(0, np.int64)
    for eps in candidates:
        clusters = dbscan(distances, eps, min_samples)
        silhouettes[eps] = mean_silhouette(distances, clusters)
        # Bad clusters are better than none, whose silhouette is 0 as well.
        merit = min(int(clusters.max(initial=OUTLIER)) + 1, 2), silhouettes[eps]
        if merit > most:
            best, most, found = eps, merit, clusters
    return ChosenEps(best, silhouettes, found)


def mean_silhouette(distances: scipy.sparse.csr_matrix, clusters: Labels) -> float:
    """The mean silhouette (Rousseeuw 1987) of a graph's clusters, from the stored distances alone.

    An image's silhouette is (b - a) / max(a, b): a is its mean distance to the others of its
    cluster, b the smallest of its mean distances to the other clusters. It is 0 for an image
    that is alone in its cluster, and for outliers.

    Args:
        distances: (N, N) symmetric CSR of distances from 0 to 1; what is not stored is 1.
        clusters: (N,) from 0 without gaps; -1 = outlier.

    Returns:
        From -1 to 1; 0 if there are fewer than two clusters.
    """
    sizes = np.bincount(clusters[clusters != OUTLIER], minlength=1)
    if len(sizes) < 2:
        return 0.0
    (inside,) = np.nonzero(clusters != OUTLIER)
    label = clusters[inside]
    members = scipy.sparse.csr_matrix(
        (np.ones(len(inside)), (inside, clusters[inside])), (len(clusters), len(sizes))
    )
    nearness = distances[inside].astype(np.float64)
    nearness.data = 1 - nearness.data
    itself = nearness[np.arange(len(inside)), inside].A1  # 1, or 0 if not stored
    # Sums of 1 - distance to the images of each cluster: pairs that are not stored add nothing.
    sums = (nearness @ members).tocsr()
    row = np.repeat(np.arange(len(inside)), np.diff(sums.indptr))
    own = sums.indices == label[row]
    of_own = np.bincount(row[own], sums.data[own], minlength=len(inside)) - itself
    others = scipy.sparse.csr_matrix(
        (np.where(own, 0, sums.data / sizes[sums.indices]), sums.indices, sums.indptr), sums.shape
    )
    size = sizes[label]
    a = 1 - of_own / np.maximum(size - 1, 1)
    b = 1 - others.max(axis=1).toarray()[:, 0]
    larger = np.maximum(a, b)
    silhouette = np.divide(b - a, larger, out=np.zeros_like(a), where=(larger > 0) & (size > 1))
    return float(silhouette.sum() / len(clusters))
