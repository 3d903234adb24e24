"""Agglomerative clustering by a counted number of merges, exact, without all N x N distances.

A step sorts the distances between clusters once, walks them in ascending order and joins the two
clusters of each, until as many clusters are gone as asked for. Distances are not computed again
within a step. `SingleLinkage` is BUC's step, `AverageLinkage` HCT's; merging one cluster at a time
with the latter is classical average linkage (UPGMA).

The k nearest neighbours of each point give candidate pairs. Walking these alone ends at some
distance T, and with all pairs it ends at T or before. A pair that is no candidate of either side is
as far apart as both sides' k-th neighbours at least. So only points whose k-th neighbour does not
prove a distance above T can lack a pair, and only with one another: their pairs are searched
through in blocks. So the walk has seen every pair up to T, and its merges are exact.

Only pairs that join two clusters are kept from walk to walk (as in Kruskal's algorithm, a pair that
joins nothing among some pairs joins nothing among more), so there are never more than C - 1, and
each block lowers T. Beside the features, memory holds at most two copies of them, what the search
for neighbours takes, and blocks of 1024 x 1024 numbers: by the sizes of these arrays, below 1 GB at
32,621 images of 2048 numbers. At worst, in diffuse clusters, the time is that of all N x N
distances in double precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from reid.neighbors import Labels, nearest_neighbors
from reid.structures import ProgressBar

Doubles = npt.NDArray[np.float64]
_FIRST_NEIGHBORS = 16
_MOST_NEIGHBORS = 1024
_BLOCK = 1024
_ROUNDING = 1e-6  # far more than that of a distance between unit vectors in double precision
_ROOM = 1 << 22  # numbers in a block of distances, 32 MB


class Pairs(NamedTuple):
    """Pairs of clusters and how far apart they are.

    Attributes:
        distance: (E,).
        first: (E,) orders pairs of equal distance.
        second: (E,) likewise, after `first`.
        one: (E,) cluster.
        other: (E,) cluster.
    """

    distance: Doubles
    first: Labels
    second: Labels
    one: Labels
    other: Labels

    def sorted(self) -> Pairs:
        """Ascending, each pair of clusters once."""
        low, high = np.minimum(self.one, self.other), np.maximum(self.one, self.other)
        order = np.lexsort((self.second, self.first, self.distance))
        _, unique = np.unique(np.stack((low[order], high[order])), axis=1, return_index=True)
        return self.take(order[np.sort(unique)])

    def take(self, places: Labels | list[int]) -> Pairs:
        """The pairs at these places, in their order."""
        return Pairs(
            self.distance[places],
            self.first[places],
            self.second[places],
            self.one[places],
            self.other[places],
        )

    def beside(self, more: Pairs) -> Pairs:
        """These pairs, then more."""
        return Pairs(
            np.concatenate((self.distance, more.distance)),
            np.concatenate((self.first, more.first)),
            np.concatenate((self.second, more.second)),
            np.concatenate((self.one, more.one)),
            np.concatenate((self.other, more.other)),
        )


class Linkage(ABC):
    """How far apart clusters are, in a step.

    Attributes:
        points: (M, D) single precision: the vectors whose neighbours are candidates.
        num_clusters: C.
    """

    points: npt.NDArray[np.float32]
    num_clusters: int

    @abstractmethod
    def pairs(self, one: Labels, other: Labels) -> Pairs:
        """The exact distances of the clusters of pairs of points; at most one for each pair."""

    @abstractmethod
    def least(self, one: Labels, squared: Doubles) -> Doubles:
        """A bound (E,): no cluster is nearer to that of point `one` (E,) by a pair that far apart.

        Args:
            one: Points.
            squared: (E,) squared Euclidean distances of the points to others.
        """

    @abstractmethod
    def may_be_within(self, rows: Labels, columns: Labels, squared: Tensor, limit: float) -> Tensor:
        """(R, K) bool: pairs of points that may be of clusters up to `limit` apart.

        Args:
            rows: (R,) points.
            columns: (K,) points.
            squared: (R, K) squared Euclidean distances.
            limit: T.
        """


class SingleLinkage(Linkage):
    """BUC's distance: the nearest two images, and a penalty on the sizes at the step's start.

    min |u_i - u_j|^2 + penalty * (n_i + n_j) over images i, j of the two clusters, n the number of
    images in their cluster (Lin et al., *A Bottom-Up Clustering Approach to Unsupervised Person
    Re-Identification*, AAAI 2019, with the square that the published code has). Pairs of equal
    distance come in the order of their images.

    Args:
        features: (N, D), finite.
        cluster: (N,) int64, from 0 without gaps.
        size_penalty: lambda.
    """

    def __init__(self, features: Tensor, cluster: Labels, size_penalty: float) -> None:
        self.points = features.detach().float().cpu().numpy()
        self.num_clusters = int(cluster.max()) + 1
        self._cluster = cluster
        size = np.bincount(cluster)
        self._penalty = size_penalty * size[cluster].astype(np.float64)
        self._least_penalty = float(self._penalty.min())

    def pairs(self, one: Labels, other: Labels) -> Pairs:
        """Exact distances, in double precision; the nearest images of each pair of clusters."""
        low, high = np.minimum(one, other), np.maximum(one, other)
        apart = self._cluster[low] != self._cluster[high]
        low, high = low[apart], high[apart]
        distance = _squared_distances(self.points, low, high)
        distance += self._penalty[low] + self._penalty[high]
        return Pairs(distance, low, high, self._cluster[low], self._cluster[high]).sorted()

    def least(self, one: Labels, squared: Doubles) -> Doubles:
        """The distance with the smallest cluster's penalty."""
        bound: Doubles = squared + self._penalty[one] + self._least_penalty
        return bound

    def may_be_within(self, rows: Labels, columns: Labels, squared: Tensor, limit: float) -> Tensor:
        """Pairs of different clusters within the limit."""
        penalty, cluster = (torch.from_numpy(x) for x in (self._penalty, self._cluster))
        near = squared + penalty[rows][:, None] + penalty[columns] <= limit + _ROUNDING
        return near & (cluster[rows][:, None] != cluster[columns])


class AverageLinkage(Linkage):
    """Average linkage: the mean Euclidean distance over the pairs of images of two clusters.

    Means of distances, unlike those of squares, do not follow from the clusters' mean vectors. But
    these bound them from below. With c the mean vectors, r the clusters' radii about them, s their
    mean squared deviations and d = |c_a - c_b|, every distance of the pair lies between
    l = max(0, d - r_a - r_b) and h = d + r_a + r_b, and the mean square is d^2 + s_a + s_b. The
    square root is concave, thus above its chord, and its mean is at least
    (d^2 + s_a + s_b + l h) / (l + h); by Jensen it is at least d too. So the exact mean, a sum over
    all pairs of images, is computed only where this bound does not rule the pair out.

    Args:
        features: (N, D), finite.
        cluster: (N,) int64, from 0 without gaps.
    """

    def __init__(self, features: Tensor, cluster: Labels) -> None:
        order = np.argsort(cluster, kind="stable")
        self._rows = features.detach().float().cpu().numpy()[order]
        self._sizes = np.bincount(cluster)
        self.num_clusters = len(self._sizes)
        self._ends = np.cumsum(self._sizes)
        starts = self._ends - self._sizes
        self.points, moved = _mean_rows(self._rows, self._ends)
        # About the rounded means, which are those that the bounds use.
        squares = np.empty(len(order))
        self._norms = np.empty(len(order))
        sorted_cluster = cluster[order]
        for start in range(0, len(order), _BLOCK):
            part = slice(start, start + _BLOCK)
            rows = self._rows[part].astype(np.float64)
            squares[part] = np.square(rows - self.points[sorted_cluster[part]]).sum(1)
            self._norms[part] = np.square(rows).sum(1)
        self._radius = np.sqrt(np.maximum.reduceat(squares, starts))
        self._spread = np.add.reduceat(squares, starts) / self._sizes
        # How far rounding may move a mean; bounds give way by as much.
        self._slack = 4 * moved + _ROUNDING

    def pairs(self, one: Labels, other: Labels) -> Pairs:
        """Exact means over the pairs of images, in double precision."""
        low, high = np.minimum(one, other), np.maximum(one, other)
        order = np.lexsort((high, low))
        low, high = low[order], high[order]
        distance = np.empty(len(low))
        bounds = np.flatnonzero(np.diff(low, prepend=-1))
        for start, stop in pairwise([*bounds, len(low)]):
            distance[start:stop] = self._means(int(low[start]), high[start:stop])
        return Pairs(distance, low, high, low, high).sorted()

    def least(self, one: Labels, squared: Doubles) -> Doubles:
        """The distance of the means, which bounds the mean distance."""
        bound: Doubles = np.sqrt(squared) - self._slack
        return bound

    def may_be_within(self, rows: Labels, columns: Labels, squared: Tensor, limit: float) -> Tensor:
        """Pairs whose bound is within the limit."""
        radius, spread = torch.from_numpy(self._radius), torch.from_numpy(self._spread)
        reach = radius[rows][:, None] + radius[columns] + self._slack
        middle = squared.sqrt()
        low, high = (middle - reach).clamp(min=0), middle + reach
        square = squared + spread[rows][:, None] + spread[columns]
        chord = (square + low * high) / (low + high).clamp(min=1e-30)
        return torch.maximum(middle, chord) - self._slack <= limit

    def _means(self, one: int, others: Labels) -> Doubles:
        """Mean distances of cluster `one` to each of `others`."""
        mine = slice(self._ends[one] - self._sizes[one], self._ends[one])
        rows, norms = self._rows[mine].astype(np.float64), self._norms[mine]
        found = np.empty(len(others))
        room = max(1, _ROOM // max(len(rows), rows.shape[1]))
        start = 0
        while start < len(others):
            filled = np.cumsum(self._sizes[others[start:]])
            stop = start + max(1, int(np.searchsorted(filled, room, side="right")))
            found[start:stop] = self._sums(rows, norms, others[start:stop])
            start = stop
        return found / (len(rows) * self._sizes[others])

    def _sums(self, rows: Doubles, norms: Doubles, others: Labels) -> Doubles:
        sizes = self._sizes[others]
        starts = np.cumsum(sizes) - sizes
        place = np.arange(sizes.sum()) + np.repeat(self._ends[others] - sizes - starts, sizes)
        theirs = self._rows[place].astype(np.float64)
        squared = norms[:, None] + self._norms[place] - 2 * rows @ theirs.T
        sums: Doubles = np.add.reduceat(np.sqrt(np.maximum(squared, 0)).sum(0), starts)
        return sums


def merge_step(linkage: Linkage, num_merges: int, progress: ProgressBar | None = None) -> Labels:
    """The clusters after one step of counted merges.

    A cluster that joins another takes the smaller of the two numbers; then numbers are made dense,
    in order.

    Args:
        linkage: How far apart clusters are.
        num_merges: How many clusters fewer; less than there are.
        progress: Called with (points' worth of pairs done, M).

    Returns:
        (C,) the new cluster of each cluster, from 0 without gaps.

    Raises:
        ValueError: `num_merges` is not from 1 to C - 1.
    """
    if not 1 <= num_merges < linkage.num_clusters:
        raise ValueError(
            f"num_merges: expected 1 to {linkage.num_clusters - 1}, fewer than the "
            f"{linkage.num_clusters} clusters; got {num_merges}"
        )
    points = linkage.points
    count = len(points)
    k = min(_FIRST_NEIGHBORS, count)
    while True:
        lists = nearest_neighbors(torch.from_numpy(points), k, progress=progress)
        joined = _walk_lists(linkage, lists, num_merges)
        if len(joined.distance) == num_merges or k >= min(_MOST_NEIGHBORS, count):
            break
        k = min(4 * k, count)
    if k < count:
        everywhere, last = np.arange(count), lists[:, -1].astype(np.int64)
        reach = linkage.least(everywhere, _squared_distances(points, everywhere, last))
        open_points = np.flatnonzero(reach <= _limit(joined, num_merges))
        joined = _walk_all(linkage, open_points, joined, num_merges)
    _, number = connected_components(
        scipy.sparse.coo_matrix(
            (np.ones(len(joined.one)), (joined.one, joined.other)),
            shape=(linkage.num_clusters, linkage.num_clusters),
        ),
        directed=False,
    )
    first = np.unique(number, return_index=True)[1]
    order = np.argsort(np.argsort(first))
    merged: Labels = order[number].astype(np.int64)
    return merged


def _walk_lists(linkage: Linkage, lists: npt.NDArray[np.int32], num_merges: int) -> Pairs:
    """The pairs that join clusters, of each point and its neighbours (M, k), itself first."""
    count, k = lists.shape
    joined = linkage.pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    for start in range(0, count, _BLOCK):
        part = lists[start : start + _BLOCK, 1:].astype(np.int64)
        one, other = np.repeat(np.arange(start, start + len(part)), k - 1), part.reshape(-1)
        keys = np.unique(np.minimum(one, other) * count + np.maximum(one, other))
        found = linkage.pairs(keys // count, keys % count)
        joined = _walk(joined.beside(found).sorted(), num_merges)
    return joined


def _walk_all(linkage: Linkage, points: Labels, joined: Pairs, num_merges: int) -> Pairs:
    """The pairs that join clusters, those before and all pairs of these points."""
    for start in range(0, len(points), _BLOCK):
        one = points[start : start + _BLOCK]
        block = torch.from_numpy(linkage.points[one]).double()
        for other_start in range(start, len(points), _BLOCK):
            other = points[other_start : other_start + _BLOCK]
            others = torch.from_numpy(linkage.points[other]).double()
            mode = "use_mm_for_euclid_dist"
            squared = torch.cdist(block, others, compute_mode=mode).square()
            near = linkage.may_be_within(one, other, squared, _limit(joined, num_merges))
            if start == other_start:
                near = near.triu(1)
            places = near.nonzero().numpy()
            if len(places):
                found = linkage.pairs(one[places[:, 0]], other[places[:, 1]])
                joined = _walk(joined.beside(found).sorted(), num_merges)
    return joined


def _limit(joined: Pairs, num_merges: int) -> float:
    """T, the distance at which the walk has ended; infinite if the pairs were too few."""
    return float(joined.distance[-1]) if len(joined.distance) == num_merges else np.inf


def _walk(pairs: Pairs, num_merges: int) -> Pairs:
    """The first of some sorted pairs that join two clusters, at most `num_merges`."""
    parent: dict[int, int] = {}

    def root(item: int) -> int:
        while (above := parent.get(item, item)) != item:
            parent[item] = parent.get(above, above)
            item = above
        return item

    kept: list[int] = []
    for place, ends in enumerate(zip(pairs.one.tolist(), pairs.other.tolist(), strict=True)):
        one, other = map(root, ends)
        if one != other:
            parent[other] = one
            kept.append(place)
            if len(kept) == num_merges:
                break
    return pairs.take(kept)


def _mean_rows(
    rows: npt.NDArray[np.float32], ends: Labels
) -> tuple[npt.NDArray[np.float32], float]:
    """Mean rows (C, D) of clusters whose rows end at `ends`, and how far rounding moved them."""
    means = np.empty((len(ends), rows.shape[1]), np.float32)
    moved = 0.0
    for start in range(0, len(ends), _BLOCK):
        part = ends[start : start + _BLOCK]
        first = ends[start - 1] if start else 0
        begins = np.concatenate(([first], part[:-1])) - first
        sums = np.add.reduceat(rows[first : part[-1]], begins, dtype=np.float64)
        exact = sums / np.diff(part, prepend=first)[:, None]
        means[start : start + _BLOCK] = exact
        difference = exact - means[start : start + _BLOCK]
        moved = max(moved, float(np.sqrt(np.square(difference).sum(1).max())))
    return means, moved


def _squared_distances(points: npt.NDArray[np.float32], one: Labels, other: Labels) -> Doubles:
    """(E,) squared Euclidean distances of pairs of points, in double precision."""
    found = np.empty(len(one))
    room = max(1, _ROOM // points.shape[1])
    for start in range(0, len(one), room):
        part = slice(start, start + room)
        difference = points[one[part]].astype(np.float64) - points[other[part]]
        found[part] = np.einsum("ed,ed->e", difference, difference)
    return found
