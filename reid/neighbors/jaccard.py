"""The sparse k-reciprocal Jaccard distance."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from numba import njit, prange
from torch import Tensor

from reid.neighbors.exact import BLOCK_SIZE, HALF_MARGIN
from reid.neighbors.jaccard_torch import jaccard_on_device
from reid.neighbors.kernels import (
    Doubles,
    Floats,
    Indices,
    Offsets,
    as_rows,
    dot,
    half_squared_norms,
)
from reid.neighbors.search import Search, approximate_neighbors, nearest_neighbors
from reid.structures import ProgressBar

_PART = 1024


def jaccard_distance(
    features: Tensor,
    k1: int = 20,
    k2: int = 6,
    *,
    max_distance: float = 1.0,
    search: Search = "exact",
    block_size: int = BLOCK_SIZE,
    progress: ProgressBar | None = None,
) -> scipy.sparse.csr_matrix:
    """k-reciprocal Jaccard distances of N images among themselves, those below 1.

    Lists of k1 neighbours (the image itself counted in), k-reciprocal sets expanded by the half
    lists of round(k1 / 2) + 1 entries, softmax of the negative squared distances, mean over the
    k2 nearest rows, and 1 - m / (2 - m) where m is the sum of minima of two rows.

    Args:
        features: (N, D), of unit length. Those on a CUDA device are worked on there; distances
            may then differ in the last bit, labels do not (see `TIE_TOLERANCE`).
        k1: Length of the neighbour lists; lists of a smaller set are as long as the set.
        k2: Rows averaged in the local query expansion, the image's own included.
        max_distance: Larger distances are left out, which saves memory.
        search: `exact`, or one of `approximate_neighbors`.
        block_size: Rows in a block of scores; does not change the result.
        progress: Called with (images' worth of work done, N).

    Returns:
        (N, N) float32 CSR, symmetric, with sorted columns. Distances of 0 are stored, those of
        each image to itself among them; what is not stored is 1 (or above `max_distance`).

    Raises:
        ValueError: An argument is out of its range, or a feature is not finite.
    """
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    rows = as_rows(features)
    count = len(rows)
    k = min(max(k1, k2), count)
    if search == "exact":
        neighbors = nearest_neighbors(features, k, block_size=block_size, progress=progress)
    else:
        neighbors = approximate_neighbors(features, k, search)
    lengths = min(k1, count), half_length(k1, count), k2
    if features.device.type == "cuda":
        on_device = features.detach(), torch.from_numpy(neighbors).to(features.device)
        return jaccard_on_device(*on_device, *lengths, max_distance)
    encoding = encode_neighbors(rows, neighbors, *lengths)
    return jaccard_of_rows(encoding, encoding, max_distance)


def jaccard_memory_mb(count: int, dim: int, k1: int = 20, k2: int = 6) -> float:
    """About how many MB `jaccard_distance` takes above the features, without what it returns.

    A half-precision copy of the features, the candidates, and the rows of weights.
    """
    candidates = 8 * (max(k1, k2) + HALF_MARGIN)
    return count * (2 * dim + candidates + 12 * k1 * k2) / 2**20


def half_length(k1: int, count: int) -> int:
    """Length of the half lists, round(k1 / 2) + 1 (half to even), at most `count`."""
    return min(round(k1 / 2) + 1, count)


def encode_neighbors(
    rows: Floats,
    neighbors: Indices,
    length: int,
    half: int,
    k2: int,
    farthest: Floats | None = None,
) -> scipy.sparse.csr_matrix:
    """Each image as weights on its expanded k-reciprocal set, averaged over its k2 neighbours.

    Args:
        rows: (N, D) features.
        neighbors: (N, k) lists, the image itself first.
        length: Entries of the lists that count, at most k.
        half: The same for the half lists.
        k2: Rows averaged; 1 = no expansion.
        farthest: None: weights are the softmax of -d, d squared Euclidean distances. (N,) largest
            d of each row: the softmax of -(d / farthest)^2, as in re-ranking.

    Returns:
        (N, N) float32 CSR with sorted columns; rows sum to 1.
    """
    norms = half_squared_norms(rows)
    scale = np.ones(len(rows), np.float32) if farthest is None else farthest
    lists = np.ascontiguousarray(neighbors[:, :length])
    reciprocal = (*_reciprocal(lists), *_reciprocal(np.ascontiguousarray(lists[:, :half])))
    sizes, _ = _expanded_sets(*reciprocal, 0)
    _, members = _expanded_sets(*reciprocal, int(sizes.max()))
    indptr = np.concatenate(([0], np.cumsum(sizes)))
    indices = members[np.arange(members.shape[1]) < sizes[:, None]]
    del members
    data = _soft_weights(rows, norms, indptr, indices, scale, farthest is not None)
    k2 = min(k2, neighbors.shape[1])
    if k2 > 1:
        nearest = np.ascontiguousarray(neighbors[:, :k2])
        sizes = _expanded_sizes(indptr, indices, data, nearest)
        new_indptr = np.concatenate(([0], np.cumsum(sizes)))
        indices, data = _expand(indptr, indices, data, nearest, new_indptr)
        indptr = new_indptr
    return scipy.sparse.csr_matrix((data, indices, indptr), shape=(len(rows), len(rows)))


def jaccard_of_rows(
    queries: scipy.sparse.csr_matrix,
    gallery: scipy.sparse.csr_matrix | scipy.sparse.csc_matrix,
    max_distance: float = 1.0,
) -> scipy.sparse.csr_matrix:
    """Jaccard distances 1 - m / (2 - m) below 1, m the sum of minima of two rows that sum to 1.

    Args:
        queries: (Q, N) with sorted columns.
        gallery: (G, N), by columns (CSC) where it is used more than once.
        max_distance: Larger distances are left out.

    Returns:
        (Q, G) float32 CSR with sorted columns and stored zeros.
    """
    columns = gallery.tocsc()
    arrays = (
        queries.indptr.astype(np.int64),
        queries.indices,
        queries.data,
        columns.indptr.astype(np.int64),
        columns.indices,
        columns.data,
    )
    counts = np.zeros(queries.shape[0], np.int64)

    def part(start: int) -> tuple[Indices, Floats]:
        stop = min(start + _PART, queries.shape[0])
        found: tuple[Indices, Floats] = _jaccard_part(
            *arrays, gallery.shape[0], start, stop, max_distance, counts
        )
        return found

    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        try:
            parts = [*pool.map(part, range(0, queries.shape[0], _PART))]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for what is left
            raise
    indptr = np.concatenate(([0], np.cumsum(counts)))
    kind = np.int32 if indptr[-1] < 2**31 else np.int64
    return scipy.sparse.csr_matrix(
        (
            np.concatenate([data for _, data in parts]),
            np.concatenate([indices for indices, _ in parts]).astype(kind, copy=False),
            indptr.astype(kind),
        ),
        shape=(queries.shape[0], gallery.shape[0]),
    )


@njit(cache=True)
def _holds(items: Indices, item: int) -> bool:
    for other in items:  # noqa: SIM110 - numba compiles no generator here
        if other == item:
            return True
    return False


@njit(parallel=True, cache=True)
def _reciprocal(lists: Indices) -> tuple[Indices, Indices]:
    """Sizes (N,) and members (N, k) of the sets {j in list(i): i in list(j)}, in list order."""
    count, k = lists.shape
    sizes = np.zeros(count, np.int32)
    members = np.empty((count, k), np.int32)
    for i in prange(count):
        size = 0
        for place in range(k):
            j = lists[i, place]
            if _holds(lists[j], i):
                members[i, size] = j
                size += 1
        sizes[i] = size
    return sizes, members


@njit(cache=True)
def _expanded_set(
    i: int, sizes: Indices, members: Indices, half_sizes: Indices, half_members: Indices
) -> tuple[int, Indices]:
    """R(i) and the half sets of its members that lie in it by more than two thirds, sorted.

    The size, and an array whose first entries are the set.
    """
    own = members[i, : sizes[i]]
    room = len(own)
    for c in own:
        room += half_sizes[c]
    union = np.empty(room, np.int32)
    size = 0
    for j in own:
        size = _add(j, union, size)
    for c in own:
        theirs = half_members[c, : half_sizes[c]]
        shared = 0
        for j in theirs:
            shared += _holds(own, j)
        if 3 * shared > 2 * len(theirs):
            for j in theirs:
                size = _add(j, union, size)
    return size, union


@njit(cache=True)
def _add(item: int, ordered: Indices, size: int) -> int:
    """Puts an item into a sorted set of some size, and returns the new size."""
    place = size
    while place > 0 and ordered[place - 1] > item:
        place -= 1
    if place > 0 and ordered[place - 1] == item:
        return size
    for other in range(size, place, -1):
        ordered[other] = ordered[other - 1]
    ordered[place] = item
    return size + 1


@njit(parallel=True, cache=True)
def _expanded_sets(
    sizes: Indices, members: Indices, half_sizes: Indices, half_members: Indices, room: int
) -> tuple[Offsets, Indices]:
    """Sizes of the expanded sets, and their first `room` members."""
    count = len(sizes)
    found_sizes = np.zeros(count, np.int64)
    found = np.empty((count, room), np.int32)
    for i in prange(count):
        size, union = _expanded_set(i, sizes, members, half_sizes, half_members)
        found_sizes[i] = size
        kept = min(size, room)
        found[i, :kept] = union[:kept]
    return found_sizes, found


@njit(parallel=True, cache=True)
def _soft_weights(
    rows: Floats,
    half_norms: Doubles,
    indptr: Offsets,
    indices: Indices,
    scale: Floats,
    squared: bool,
) -> Floats:
    """Softmax of the negative distances from each image to the members of its set."""
    weights = np.empty(len(indices), np.float32)
    for i in prange(len(rows)):
        first, last = indptr[i], indptr[i + 1]
        exact = np.empty(last - first, np.float64)
        total = 0.0
        for place in range(first, last):
            j = indices[place]
            product = dot(rows[i], rows[j])
            distance = max(2 * (half_norms[i] + half_norms[j] - product), 0.0)
            if squared:
                distance = (distance / scale[i]) ** 2 if scale[i] > 0 else 0.0
            exact[place - first] = np.exp(-distance)
            total += exact[place - first]
        for place in range(first, last):
            weights[place] = exact[place - first] / total
    return weights


@njit(cache=True)
def _next_column(
    nearest: Indices, indptr: Offsets, indices: Indices, data: Floats, heads: Offsets
) -> tuple[int, float]:
    """The first column not taken yet of some sorted rows, and its sum over them; -1 = none left."""
    column = -1
    for n in range(len(nearest)):
        if heads[n] < indptr[nearest[n] + 1] and (column < 0 or indices[heads[n]] < column):
            column = indices[heads[n]]
    total = 0.0
    for n in range(len(nearest)):
        if heads[n] < indptr[nearest[n] + 1] and indices[heads[n]] == column:
            total += data[heads[n]]
            heads[n] += 1
    return column, total


@njit(parallel=True, cache=True)
def _expanded_sizes(indptr: Offsets, indices: Indices, data: Floats, nearest: Indices) -> Offsets:
    sizes = np.zeros(len(nearest), np.int64)
    for i in prange(len(nearest)):
        heads = indptr[nearest[i]]
        size = 0
        while _next_column(nearest[i], indptr, indices, data, heads)[0] >= 0:
            size += 1
        sizes[i] = size
    return sizes


@njit(parallel=True, cache=True)
def _expand(
    indptr: Offsets, indices: Indices, data: Floats, nearest: Indices, new_indptr: Offsets
) -> tuple[Indices, Floats]:
    """Local query expansion: each row becomes the mean of the rows near it."""
    new_indices = np.empty(new_indptr[-1], np.int32)
    new_data = np.empty(new_indptr[-1], np.float32)
    for i in prange(len(nearest)):
        heads = indptr[nearest[i]]
        for out in range(new_indptr[i], new_indptr[i + 1]):
            column, total = _next_column(nearest[i], indptr, indices, data, heads)
            new_indices[out] = column
            new_data[out] = total / nearest.shape[1]
    return new_indices, new_data


@njit(nogil=True, cache=True)
def _jaccard_part(
    indptr: Offsets,
    indices: Indices,
    data: Floats,
    column_indptr: Offsets,
    column_indices: Indices,
    column_data: Floats,
    num_gallery: int,
    start: int,
    stop: int,
    max_distance: float,
    counts: Offsets,
) -> tuple[Indices, Floats]:
    """Columns and distances of the rows start to stop, row after row; fills in their counts."""
    shared = np.zeros(num_gallery, np.float64)
    touched = np.empty(num_gallery, np.int32)
    room = 64 * (stop - start)
    found = np.empty(room, np.int32)
    distances = np.empty(room, np.float32)
    size = 0
    for i in range(start, stop):
        num_touched = 0
        for place in range(indptr[i], indptr[i + 1]):
            column, weight = indices[place], data[place]
            for other in range(column_indptr[column], column_indptr[column + 1]):
                j = column_indices[other]
                smaller = min(weight, column_data[other])
                if smaller == 0.0:
                    continue  # underflow of a far member's weight
                if shared[j] == 0.0:
                    touched[num_touched] = j
                    num_touched += 1
                shared[j] += smaller
        if size + num_touched > room:
            room = 2 * (size + num_touched)
            found = _grown(found[:size], room)
            distances = _grown(distances[:size], room)
        before = size
        for j in np.sort(touched[:num_touched]):
            overlap = shared[j]
            shared[j] = 0.0
            distance = np.float32(max(1.0 - overlap / (2.0 - overlap), 0.0))
            if distance < 1.0 and distance <= max_distance:
                found[size] = j
                distances[size] = distance
                size += 1
        counts[i] = size - before
    return found[:size].copy(), distances[:size].copy()


@njit(nogil=True, cache=True)
def _grown(values: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
    larger = np.empty(room, values.dtype)
    larger[: len(values)] = values
    return larger
