"""DBSCAN on a sparse graph of distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

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
    return dbscan_of_blocks(
        lambda: [distances], distances.shape[0], eps, min_samples, tolerance,
        always_itself=always_itself,
    )  # fmt: skip


def dbscan_of_blocks(
    blocks: Callable[[], Iterable[Compressed]],
    count: int,
    eps: float,
    min_samples: int,
    tolerance: float = TIE_TOLERANCE,
    *,
    always_itself: bool = True,
) -> Labels:
    """`dbscan` of a graph that comes in blocks of rows, of which one at a time is in memory.

    Clusters are what joins core points: each pair of them within eps joins two trees, whose root is
    their first point. So the order of the blocks would not matter, and a number for each point is
    all that is kept between them.

    Args:
        blocks: Called three times; gives the blocks (n, N) in the order of their rows.
        count: N.
        eps: As in `dbscan`, and so are the others.
        min_samples: 1 or more.
        tolerance: 0 or more.
        always_itself: See `dbscan`.

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
    largest = np.float32(eps + tolerance)
    core, root = np.empty(count, np.bool_), np.arange(count, dtype=np.int32)
    for first, block, operations in _with_places(blocks()):
        run_in_pieces(_find_core, block[0], operations, *block[1:], largest, min_samples,
                      always_itself, first, core)  # fmt: skip
    threads = numba.get_num_threads()
    for first, block, operations in _with_places(blocks()):
        run_in_pieces(
            _join_core, block[0], 4 * operations * threads, *block[1:], largest, first, core, root
        )
    labels, clusters = np.full(count, -1, np.int64), np.zeros(1, np.int64)
    run_in_pieces(_number_clusters, count, 8 * threads, core, root, clusters, labels)
    for first, block, operations in _with_places(blocks()):
        run_in_pieces(
            _label_borders, block[0], operations, *block[1:], largest, first, core, labels
        )
    return labels


def _with_places(
    blocks: Iterable[Compressed],
) -> Iterator[tuple[int, tuple[int, Offsets, Indices, Floats], float]]:
    """For each block: its first row; its number of rows and arrays; entries in a row."""
    first = 0
    for block in blocks:
        rows = len(block.indptr) - 1
        arrays = block.indptr.astype(np.int64, copy=False), block.indices, block.data
        yield first, (rows, *arrays), float(block.indptr[-1]) / max(rows, 1)
        first += rows


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
    first: int,
    core: Flags,
) -> None:
    for row in prange(start, stop):
        i = first + row
        near = 1 if always_itself else 0
        for place in range(indptr[row], indptr[row + 1]):
            near += data[place] <= eps and not (always_itself and indices[place] == i)
        core[i] = near >= min_samples


@njit(cache=True)
def _root_of(root: Indices, i: int) -> int:
    """The first point of the tree of `i`; makes the way to it shorter."""
    while root[i] != i:
        root[i] = root[root[i]]
        i = root[i]
    return i


@njit(cache=True)
def _join_core(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    data: Floats,
    eps: np.float32,
    first: int,
    core: Flags,
    root: Indices,
) -> None:
    for row in range(start, stop):
        if not core[first + row]:
            continue
        mine = _root_of(root, first + row)
        for place in range(indptr[row], indptr[row + 1]):
            if data[place] <= eps and core[indices[place]]:
                other = _root_of(root, indices[place])
                root[max(mine, other)] = mine = min(mine, other)


@njit(cache=True)
def _number_clusters(
    start: int, stop: int, core: Flags, root: Indices, clusters: Labels, labels: Labels
) -> None:
    for i in range(start, stop):
        if not core[i]:
            continue
        if root[i] == i:
            labels[i] = clusters[0]
            clusters[0] += 1
        else:
            labels[i] = labels[_root_of(root, i)]


@njit(parallel=True, cache=True)
def _label_borders(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    data: Floats,
    eps: np.float32,
    first: int,
    core: Flags,
    labels: Labels,
) -> None:
    """Points that are no core join the first cluster that has a core point within eps."""
    for row in prange(start, stop):
        if core[first + row]:
            continue
        label = np.int64(-1)
        for place in range(indptr[row], indptr[row + 1]):
            j = indices[place]
            if data[place] <= eps and core[j] and (label < 0 or labels[j] < label):
                label = labels[j]
        labels[first + row] = label
