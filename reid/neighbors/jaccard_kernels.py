"""Compiled loops of the Jaccard distance."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from reid.neighbors.kernels import AnyFloats, Doubles, Floats, Indices, Offsets, dot


@njit(cache=True)
def _holds(items: Indices, item: int) -> bool:
    for other in items:  # noqa: SIM110 - numba compiles no generator here
        if other == item:
            return True
    return False


@njit(parallel=True, cache=True)
def find_reciprocal(
    start: int, stop: int, lists: Indices, sizes: Indices, members: Indices
) -> None:
    """Sizes and members of the sets {j in list(i): i in list(j)}, in list order."""
    for i in prange(start, stop):
        size = 0
        for place in range(lists.shape[1]):
            j = lists[i, place]
            if _holds(lists[j], i):
                members[i, size] = j
                size += 1
        sizes[i] = size


@njit(cache=True)
def _expanded_set(
    i: int, sizes: Indices, members: Indices, half_sizes: Indices, half_members: Indices
) -> tuple[int, Indices]:
    """The expanded set: R(i), and the half sets of its members of which two thirds lie in R(i).

    Returns its size, and an array whose first entries are the sorted set.
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
    """Puts an item into a sorted set of `size` items; returns the new size."""
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
def count_members(
    start: int,
    stop: int,
    sizes: Indices,
    members: Indices,
    half_sizes: Indices,
    half_members: Indices,
    counts: Offsets,
) -> None:
    """Sizes of the expanded sets."""
    for i in prange(start, stop):
        counts[i] = _expanded_set(i, sizes, members, half_sizes, half_members)[0]


@njit(parallel=True, cache=True)
def list_members(
    start: int,
    stop: int,
    sizes: Indices,
    members: Indices,
    half_sizes: Indices,
    half_members: Indices,
    indptr: Offsets,
    indices: Indices,
) -> None:
    """Members of the expanded sets, sorted."""
    for i in prange(start, stop):
        size, union = _expanded_set(i, sizes, members, half_sizes, half_members)
        for place in range(size):
            indices[indptr[i] + place] = union[place]


@njit(parallel=True, cache=True)
def soft_weights(
    start: int,
    stop: int,
    rows: Floats,
    half_norms: Doubles,
    indptr: Offsets,
    indices: Indices,
    scale: Floats,
    squared: bool,
    weights: Floats,
) -> None:
    """Softmax of the negative distances from each image to the members of its set.

    Squared Euclidean distances are divided by the image's scale, then squared if `squared`.
    """
    for i in prange(start, stop):
        first, last = indptr[i], indptr[i + 1]
        exact = np.empty(last - first, np.float64)
        total = 0.0
        for place in range(first, last):
            j = indices[place]
            product = dot(rows[i], rows[j])
            distance = max(2 * (half_norms[i] + half_norms[j] - product), 0.0)
            distance = distance / scale[i] if scale[i] > 0 else 0.0
            if squared:
                distance = distance**2
            exact[place - first] = np.exp(-distance)
            total += exact[place - first]
        for place in range(first, last):
            weights[place] = exact[place - first] / total


@njit(cache=True)
def _next_column(
    nearest: Indices, indptr: Offsets, indices: Indices, data: AnyFloats, heads: Offsets
) -> tuple[int, float]:
    """The next column of some sorted rows, and its sum over the rows; -1 = no column is left."""
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
def count_columns(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    data: AnyFloats,
    nearest: Indices,
    counts: Offsets,
) -> None:
    """Sizes of the rows that `average_rows` gives."""
    for i in prange(start, stop):
        heads = indptr[nearest[i]]
        size = 0
        while _next_column(nearest[i], indptr, indices, data, heads)[0] >= 0:
            size += 1
        counts[i] = size


@njit(parallel=True, cache=True)
def average_rows(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    data: AnyFloats,
    nearest: Indices,
    new_indptr: Offsets,
    new_indices: Indices,
    new_data: AnyFloats,
) -> None:
    """The mean of the k2 rows near each row, by columns in order."""
    for i in prange(start, stop):
        heads = indptr[nearest[i]]
        for out in range(new_indptr[i], new_indptr[i + 1]):
            column, total = _next_column(nearest[i], indptr, indices, data, heads)
            new_indices[out] = column
            new_data[out] = total / nearest.shape[1]


@njit(cache=True)
def count_in_columns(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    first: int,
    last: int,
    counts: Offsets,
) -> None:
    """Adds to the number of entries of each column from `first` to `last`."""
    for place in range(indptr[start], indptr[stop]):
        column = indices[place]
        if first <= column < last:
            counts[column - first] += 1


@njit(cache=True)
def take_by_column(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    data: AnyFloats,
    first: int,
    last: int,
    heads: Offsets,
    column_indices: Indices,
    column_data: AnyFloats,
) -> None:
    """Puts each entry of the columns from `first` to `last` into the next free place of its column.

    `heads` gives these places.
    """
    for i in range(start, stop):
        for place in range(indptr[i], indptr[i + 1]):
            column = indices[place] - first
            if 0 <= column < last - first:
                column_indices[heads[column]] = i
                column_data[heads[column]] = data[place]
                heads[column] += 1


@njit(parallel=True, cache=True)
def count_pairs(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    column_indptr: Offsets,
    pairs: Offsets,
) -> None:
    """For each row, how many entries of the matrix lie in the columns of the row's entries."""
    for i in prange(start, stop):
        total = 0
        for place in range(indptr[i], indptr[i + 1]):
            column = indices[place]
            total += column_indptr[column + 1] - column_indptr[column]
        pairs[i] = total


@njit(nogil=True, cache=True)
def jaccard_part(
    start: int,
    stop: int,
    indptr: Offsets,
    indices: Indices,
    data: AnyFloats,
    column_indptr: Offsets,
    column_indices: Indices,
    column_data: AnyFloats,
    num_gallery: int,
    max_distance: float,
    counts: Offsets,
) -> tuple[Indices, AnyFloats]:
    """Columns and distances of the rows start to stop, row after row; fills in their counts."""
    shared = np.zeros(num_gallery, np.float64)
    touched = np.empty(num_gallery, np.int32)
    room = 64 * (stop - start)
    found = np.empty(room, np.int32)
    distances = np.empty(room, data.dtype)
    size = 0
    for i in range(start, stop):
        num_touched = 0
        for place in range(indptr[i], indptr[i + 1]):
            column, weight = indices[place], data[place]
            for other in range(column_indptr[column], column_indptr[column + 1]):
                j = column_indices[other]
                smaller = min(weight, column_data[other])
                if smaller == 0.0:
                    continue  # the weight of a far member underflowed
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
            distances[size] = max(1.0 - overlap / (2.0 - overlap), 0.0)
            if distances[size] < 1.0 and distances[size] <= max_distance:  # as stored: rounded
                found[size] = j
                size += 1
        counts[i] = size - before
    return found[:size].copy(), distances[:size].copy()


@njit(nogil=True, cache=True)
def _grown(values: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
    larger = np.empty(room, values.dtype)
    for place in range(len(values)):
        larger[place] = values[place]
    return larger
