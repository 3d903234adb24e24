"""The sparse k-reciprocal Jaccard distance."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from reid.neighbors.exact import BLOCK_SIZE
from reid.neighbors.jaccard_kernels import (
    average_rows,
    count_columns,
    count_in_columns,
    count_members,
    count_pairs,
    find_reciprocal,
    jaccard_part,
    list_members,
    soft_weights,
    take_by_column,
)
from reid.neighbors.jaccard_torch import jaccard_on_device
from reid.neighbors.kernels import (
    PIECE,
    AnyFloats,
    Floats,
    Indices,
    Offsets,
    as_rows,
    half_squared_norms,
    run_in_pieces,
)
from reid.neighbors.search import Search, approximate_neighbors, nearest_neighbors
from reid.neighbors.sparse import Compressed, Rows
from reid.structures import ProgressBar

if TYPE_CHECKING:
    import scipy.sparse

_ROWS = 1024
_PAIR = 4  # operations per pair of entries


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
    """The k-reciprocal Jaccard distances below 1 of N images among themselves.

    Lists of k1 neighbours (the image itself included), k-reciprocal sets expanded by the half
    lists of round(k1 / 2) + 1 entries, softmax of the negative squared distances, mean over the
    k2 nearest rows, and 1 - m / (2 - m) where m is the sum of minima of two rows.

    Args:
        features: (N, D), of unit length. On a CUDA device the work is done there; distances may
            then differ in the last bit, but labels do not (see `TIE_TOLERANCE`).
        k1: Length of the neighbour lists; lists of a smaller set are as long as the set.
        k2: Rows averaged in the local query expansion, the image's own included.
        max_distance: Larger distances are left out, which saves memory.
        search: `exact`, or one of `approximate_neighbors`.
        block_size: Rows in a block of scores; does not change the result.
        progress: Called with (images' worth of work done, N).

    Returns:
        (N, N) float32 CSR, symmetric, with sorted columns. Distances of 0 are stored, such as
        that of each image to itself. Pairs that are not stored have distance 1 (or above
        `max_distance`).

    Raises:
        ValueError: An argument is out of its range, or a feature is not finite.
    """
    return jaccard_rows(
        features,
        k1,
        k2,
        max_distance=max_distance,
        search=search,
        block_size=block_size,
        progress=progress,
    ).csr()


def jaccard_rows(
    features: Tensor,
    k1: int = 20,
    k2: int = 6,
    *,
    max_distance: float = 1.0,
    search: Search = "exact",
    block_size: int = BLOCK_SIZE,
    progress: ProgressBar | None = None,
) -> Rows:
    """The distances of `jaccard_distance` in plain arrays, without scipy.

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
        neighbors = approximate_neighbors(features, k, search, progress=progress)
    lengths = min(k1, count), half_length(k1, count), k2
    if features.device.type == "cuda":
        on_device = features.detach(), torch.from_numpy(neighbors).to(features.device)
        return jaccard_on_device(*on_device, *lengths, max_distance)
    encoding = _encode(rows, neighbors, *lengths)
    return distances_of_rows(encoding, _by_columns(encoding), count, max_distance)


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
    squared: bool = True,
) -> scipy.sparse.csr_matrix:
    """Each image as weights on its expanded k-reciprocal set, averaged over its k2 neighbours.

    Args:
        rows: (N, D) features.
        neighbors: (N, k) lists, the image itself first.
        length: Entries of the lists that count, at most k.
        half: Entries of the half lists that count.
        k2: Rows averaged; 1 = no expansion.
        farthest: None: weights are the softmax of -d, where d is the squared Euclidean distance.
            (N,), the largest d of each row: the softmax of -(d / farthest)^2, as in re-ranking.
        squared: False: of -d / farthest, as in SSG's and MMT's distance.

    Returns:
        (N, N) float32 CSR with sorted columns; rows sum to 1.
    """
    return _encode(rows, neighbors, length, half, k2, farthest, squared).csr()


def _encode(
    rows: Floats,
    neighbors: Indices,
    length: int,
    half: int,
    k2: int,
    farthest: Floats | None = None,
    squared: bool = True,
) -> Rows:
    norms = half_squared_norms(rows)
    scale = np.ones(len(rows), np.float32) if farthest is None else farthest
    lists = np.ascontiguousarray(neighbors[:, :length])
    indptr, indices = expanded_sets(lists, half)
    data = np.empty(len(indices), np.float32)
    run_in_pieces(
        soft_weights, len(rows), rows.shape[1] * len(indices) / len(rows),
        rows, norms, indptr, indices, scale, squared and farthest is not None, data,
    )  # fmt: skip
    return average_encodings(indptr, indices, data, neighbors[:, :k2])


def average_encodings(indptr: Offsets, indices: Indices, data: AnyFloats, nearest: Indices) -> Rows:
    """The local query expansion: each row of weights becomes the mean of its neighbours' rows.

    Args:
        indptr: (N + 1,) where each row of weights begins and ends.
        indices: Column of each weight, sorted in its row.
        data: The weights, in single or double precision, which the result keeps.
        nearest: (N, k2) rows averaged for each row; with k2 = 1 nothing is averaged.

    Returns:
        (N, N) weights.
    """
    if nearest.shape[1] > 1:
        indptr, indices, data = _expand(indptr, indices, data, np.ascontiguousarray(nearest))
    return Rows(indptr, indices, data, (len(nearest), len(nearest)))


def jaccard_of_rows(
    queries: scipy.sparse.csr_matrix,
    gallery: scipy.sparse.csr_matrix | scipy.sparse.csc_matrix,
    max_distance: float = 1.0,
) -> scipy.sparse.csr_matrix:
    """Jaccard distances 1 - m / (2 - m) below 1; m = sum of minima of two rows that sum to 1.

    Args:
        queries: (Q, N) with sorted columns.
        gallery: (G, N); by columns (CSC) if it is used more than once.
        max_distance: Larger distances are left out.

    Returns:
        (Q, G) CSR with sorted columns and stored zeros, in the precision of the queries.
    """
    columns = gallery if gallery.format == "csc" else by_columns(gallery)
    return distances_of_rows(queries, columns, gallery.shape[0], max_distance).csr()


def distances_of_rows(
    queries: Compressed, columns: Compressed, gallery: int, max_distance: float
) -> Rows:
    """`jaccard_of_rows` for queries (Q, N) by rows and a gallery (`gallery`, N) by columns."""
    arrays: tuple[Any, Any, Any, Any, Any, Any] = (
        queries.indptr.astype(np.int64, copy=False),
        queries.indices,
        queries.data,
        columns.indptr.astype(np.int64, copy=False),
        columns.indices,
        columns.data,
    )
    counts = np.zeros(queries.shape[0], np.int64)

    def part(rows: tuple[int, int]) -> tuple[Indices, AnyFloats]:
        found: tuple[Indices, AnyFloats] = jaccard_part(
            *rows, *arrays, gallery, max_distance, counts
        )
        return found

    pairs = np.empty(queries.shape[0], np.int64)
    operations = float(queries.indptr[-1] - queries.indptr[0]) / max(queries.shape[0], 1)
    run_in_pieces(count_pairs, len(pairs), operations, *arrays[:2], arrays[3], pairs)
    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        try:
            parts = [*pool.map(part, _parts(pairs))]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the other parts
            raise
    indptr = np.concatenate(([0], np.cumsum(counts)))
    kind = np.int32 if indptr[-1] < 2**31 else np.int64
    return Rows(
        indptr.astype(kind),
        np.concatenate([indices for indices, _ in parts]).astype(kind, copy=False),
        np.concatenate([data for _, data in parts]),
        (queries.shape[0], gallery),
    )


def by_columns(rows: scipy.sparse.csr_matrix) -> scipy.sparse.csc_matrix:
    """The matrix by columns, as `tocsc` gives it, but Ctrl-C can interrupt the work."""
    import scipy.sparse

    columns = _by_columns(rows)
    return scipy.sparse.csc_matrix(
        (columns.data, columns.indices, columns.indptr), shape=rows.shape
    )


def _by_columns(rows: Compressed) -> Rows:
    """The matrix by columns, as plain arrays."""
    count, width = rows.shape
    operations = 4 * float(rows.indptr[-1]) / max(count, 1) * numba.get_num_threads()
    old = rows.indptr.astype(np.int64, copy=False), rows.indices
    heads = np.zeros(width + 1, np.int64)
    run_in_pieces(count_in_columns, count, operations, *old, 0, width, heads[1:])
    np.cumsum(heads, out=heads)
    indptr = heads.copy()
    indices, data = np.empty_like(rows.indices), np.empty_like(rows.data)
    run_in_pieces(
        take_by_column, count, operations, *old, rows.data, 0, width, heads, indices, data
    )
    return Rows(indptr, indices, data, (width, count))


def _parts(pairs: Offsets) -> list[tuple[int, int]]:
    """Ranges of rows, each some tenths of a second of work for a thread.

    Args:
        pairs: (Q,) number of pairs of entries that each row has.
    """
    most = min(_ROWS, -(-len(pairs) // numba.get_num_threads()))
    ends = np.cumsum(pairs)
    parts, start = [], 0
    while start < len(pairs):
        room = ends[start] - pairs[start] + PIECE / _PAIR
        stop = min(int(np.searchsorted(ends, room, "right")), start + most)
        parts.append((start, max(stop, start + 1)))
        start = parts[-1][1]
    return parts


def _reciprocal(lists: Indices) -> tuple[Indices, Indices]:
    """Sizes (N,) and members (N, k) of the sets {j in list(i): i in list(j)}, in list order."""
    count, k = lists.shape
    sizes, members = np.empty(count, np.int32), np.empty((count, k), np.int32)
    run_in_pieces(find_reciprocal, count, k * k, lists, sizes, members)
    return sizes, members


def expanded_sets(lists: Indices, half: int) -> tuple[Offsets, Indices]:
    """Offsets (N + 1,) and sorted members of the expanded k-reciprocal sets of all images.

    Args:
        lists: (N, k) neighbours of each image. A list without the image itself makes a set that
            may lack it, or be empty.
        half: Entries of the half lists, at most k.
    """
    count, k = lists.shape
    reciprocal = (*_reciprocal(lists), *_reciprocal(np.ascontiguousarray(lists[:, :half])))
    indptr = np.zeros(count + 1, np.int64)
    run_in_pieces(count_members, count, k * k * half, *reciprocal, indptr[1:])
    np.cumsum(indptr, out=indptr)
    indices = np.empty(indptr[-1], np.int32)
    run_in_pieces(list_members, count, k * k * half, *reciprocal, indptr, indices)
    return indptr, indices


def _expand(
    indptr: Offsets, indices: Indices, data: AnyFloats, nearest: Indices
) -> tuple[Offsets, Indices, AnyFloats]:
    """Local query expansion: each row becomes the mean of its neighbours' rows."""
    count, k2 = nearest.shape
    operations = 2 * k2 * k2 * len(indices) / count
    new_indptr = np.zeros(count + 1, np.int64)
    old = indptr, indices, data, nearest
    run_in_pieces(count_columns, count, operations, *old, new_indptr[1:])
    np.cumsum(new_indptr, out=new_indptr)
    new_indices = np.empty(new_indptr[-1], np.int32)
    new_data = np.empty(new_indptr[-1], data.dtype)
    run_in_pieces(average_rows, count, operations, *old, new_indptr, new_indices, new_data)
    return new_indptr, new_indices, new_data
