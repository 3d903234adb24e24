"""Chooses DBSCAN's eps: by the clusters' silhouette, or as a mean of the smallest distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse

from reid.neighbors import TIE_TOLERANCE, Labels, SparseDistances, dbscan, row_blocks
from reid.structures import OUTLIER

Doubles = npt.NDArray[np.float64]

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
    does not (`eps_of_share`): its eps is the mean of the 0.16 % smallest distances of all pairs,
    which fits only sets of a certain size.

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


def eps_of_share(distances: SparseDistances, rho: float) -> float:
    """The mean of a share of the smallest distances: SSG's and MMT's eps.

    Fu et al., *Self-similarity Grouping* (ICCV 2019): of the pairs i < j whose distance is not 0,
    the mean of the round(rho * their number) smallest. Distances up to 1e-6 count as 0, since
    exact duplicates of an image are at a distance of 0 but for rounding.

    Pairs that are not stored count with their distances. They are computed, block by block, only if
    the stored ones do not suffice. At 32,621 images and rho 0.0016, the mean is of 0.85 million
    distances.

    Args:
        distances: All that are stored, nothing cut.
        rho: Share of the pairs, above 0 and at most 1.

    Raises:
        ValueError: `rho` is out of its range, or so small that it is no pair.
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho: expected above 0 and at most 1, got {rho}")
    graph = distances.graph
    count = graph.shape[0]
    row = np.repeat(np.arange(count, dtype=np.int32), np.diff(graph.indptr))
    stored = graph.data[graph.indices > row]
    above = stored > TIE_TOLERANCE
    pairs = count * (count - 1) // 2 - int(len(above) - above.sum())
    number = round(rho * pairs)
    if number < 1:
        raise ValueError(
            f"rho: {rho:g} of {pairs:,} pairs is no pair; for {count:,} images take at least "
            f"{1 / max(pairs, 1):.2g}"
        )
    smallest = _smallest(stored[above].astype(np.float64), number)
    if len(smallest) < number or smallest.max() > distances.least_missing:
        smallest = _with_missing(distances, smallest, number)
    return float(smallest.mean())


def _smallest(values: Doubles, number: int) -> Doubles:
    if len(values) > number:
        values = np.partition(values, number - 1)[:number]
    return values


def _with_missing(distances: SparseDistances, smallest: Doubles, number: int) -> Doubles:
    """The smallest distances of all pairs, given those of the stored pairs."""
    graph, push = distances.graph, distances.push
    if not push.any():  # all missing ones are equal
        return np.append(smallest, np.full(number - len(smallest), distances.far))
    columns = np.arange(len(push))
    for start, stop in row_blocks(len(push)):
        rows = columns[start:stop, None]
        block = distances.far + push[start:stop, None] + push
        missing = columns > rows
        part = graph[start:stop]
        missing[np.repeat(rows[:, 0] - start, np.diff(part.indptr)), part.indices] = False
        if len(smallest) == number:
            missing &= block < smallest.max()
        smallest = _smallest(np.append(smallest, block[missing]), number)
    return smallest


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
