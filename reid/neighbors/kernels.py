"""Compiled loops of the exact search, and the types of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import njit, prange
from torch import Tensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
AnyFloats = npt.NDArray[Any]
Indices = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
_CHUNK = 64
_NO_NANS = {"nnan", "nsz"}
PIECE = 5e7
"""Operations of a thread between two chances for Ctrl-C: some tenths of a second."""


def run_in_pieces(
    kernel: Callable[..., None], count: int, operations: float, *arguments: object
) -> None:
    """Calls `kernel(start, stop, *arguments)` for all `count` rows, part by part.

    Python handles Ctrl-C between two calls of compiled code, not during one.

    Args:
        kernel: Works on the rows from start to stop, with all threads.
        count: Rows.
        operations: About how many operations a row takes; for a kernel of one thread, multiply by
            the number of threads.
        *arguments: Further arguments of the kernel.
    """
    step = max(1, int(PIECE / max(operations, 1))) * numba.get_num_threads()
    for start in range(0, count, step):
        kernel(start, min(start + step, count), *arguments)


def as_rows(features: Tensor) -> Floats:
    """Features (N, D) as an array of single precision.

    Raises:
        ValueError: The shape is wrong, there is no feature, or a number is not finite.
    """
    if features.ndim != 2 or not len(features) or not features.shape[1]:
        raise ValueError(f"features: expected (N, D) with N, D > 0, got {tuple(features.shape)}")
    rows: Floats = np.ascontiguousarray(features.detach().float().cpu().numpy())
    if not all_finite(rows):
        raise ValueError("features: expected finite numbers, got NaN or infinity")
    return rows


@njit(cache=True)
def _insert(value: float, item: int, scores: npt.NDArray[Any], index: Indices) -> None:
    """Puts an item into a list sorted by score, then index; the last item drops out."""
    place = len(scores) - 1
    while place > 0 and (
        scores[place - 1] < value or (scores[place - 1] == value and index[place - 1] > item)
    ):
        scores[place] = scores[place - 1]
        index[place] = index[place - 1]
        place -= 1
    scores[place] = value
    index[place] = item


@njit(cache=True)
def insert_smaller(value: float, item: int, values: Doubles, items: Indices) -> None:
    """Puts an item behind all items of the same value or less; the last item drops out."""
    place = len(values) - 1
    while place > 0 and values[place - 1] > value:
        values[place] = values[place - 1]
        items[place] = items[place - 1]
        place -= 1
    values[place] = value
    items[place] = item


@njit(cache=True)
def _replace_worst(value: float, item: int, scores: Floats, index: Indices) -> None:
    """Replaces the worst item of a heap, which is its root, by a new item."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= len(scores):
            break
        if child + 1 < len(scores) and scores[child + 1] < scores[child]:
            child += 1
        if scores[child] >= value:
            break
        scores[place] = scores[child]
        index[place] = index[child]
        place = child
    scores[place] = value
    index[place] = item


@njit(parallel=True, cache=True, fastmath=_NO_NANS)
def take_rows(
    products: Floats,
    half_norms: Floats,
    left: int,
    right: int,
    scores: Floats,
    index: Indices,
) -> None:
    """Offers the scores x.y - y.y / 2 of a block to the heaps of the x, which start at `left`."""
    height, width = products.shape
    for r in prange(height):
        i = left + r
        threshold = scores[i, 0]
        for start in range(0, width, _CHUNK):
            product = products[r, start : start + _CHUNK]
            norm = half_norms[right + start : right + start + len(product)]
            hits = np.int32(0)  # without branches, a CPU counts 16 values at a time
            for c in range(len(product)):
                hits += np.int32(product[c] - norm[c] > threshold)
            if hits:
                for c in range(len(product)):
                    score = product[c] - norm[c]
                    if score > threshold:
                        _replace_worst(score, right + start + c, scores[i], index[i])
                        threshold = scores[i, 0]


@njit(parallel=True, cache=True, fastmath=_NO_NANS)
def take_columns(
    products: Floats,
    half_norms: Floats,
    left: int,
    right: int,
    scores: Floats,
    index: Indices,
) -> None:
    """Offers the scores x.y - x.x / 2 of a block to the heaps of the y, which start at `right`."""
    height, width = products.shape
    for chunk in prange((width + _CHUNK - 1) // _CHUNK):
        start = chunk * _CHUNK
        first = right + start
        threshold = scores[first : first + min(_CHUNK, width - start), 0].copy()
        for r in range(height):
            norm = half_norms[left + r]
            product = products[r, start : start + _CHUNK]
            hits = np.int32(0)
            for c in range(len(threshold)):
                hits += np.int32(product[c] - norm > threshold[c])
            if hits:
                for c in range(len(threshold)):
                    score = product[c] - norm
                    if score > threshold[c]:
                        _replace_worst(score, left + r, scores[first + c], index[first + c])
                        threshold[c] = scores[first + c, 0]


@njit(cache=True)
def dot(one: Floats, other: Floats) -> float:
    """Inner product in double precision, in the same order of additions on every machine.

    Products of single-precision numbers are exact in double precision, so fused multiply-adds
    change nothing.
    """
    dim = len(one)
    whole = dim - dim % 8
    a = b = c = d = e = f = g = h = 0.0
    for x in range(0, whole, 8):
        a += np.float64(one[x]) * np.float64(other[x])
        b += np.float64(one[x + 1]) * np.float64(other[x + 1])
        c += np.float64(one[x + 2]) * np.float64(other[x + 2])
        d += np.float64(one[x + 3]) * np.float64(other[x + 3])
        e += np.float64(one[x + 4]) * np.float64(other[x + 4])
        f += np.float64(one[x + 5]) * np.float64(other[x + 5])
        g += np.float64(one[x + 6]) * np.float64(other[x + 6])
        h += np.float64(one[x + 7]) * np.float64(other[x + 7])
    for x in range(whole, dim):
        a += np.float64(one[x]) * np.float64(other[x])
    return ((a + e) + (c + g)) + ((b + f) + (d + h))


def half_squared_norms(rows: Floats) -> Doubles:
    """Half the squared length of each row (N,)."""
    norms = np.empty(len(rows), np.float64)
    run_in_pieces(_half_squared_norms, *rows.shape, rows, norms)
    return norms


@njit(parallel=True, cache=True)
def _half_squared_norms(start: int, stop: int, rows: Floats, norms: Doubles) -> None:
    for i in prange(start, stop):
        norms[i] = 0.5 * dot(rows[i], rows[i])


def rescore(
    rows: Floats,
    half_norms: Doubles,
    which: Indices,
    scores: Floats,
    index: Indices,
    k: int,
    bound: float,
    unit: float,
) -> tuple[Indices, Flags]:
    """The k best candidates of the rows `which`, and whether a neighbour may be missing.

    The candidates' scores and their error bound are scaled by `unit`.
    """
    found, doubtful = np.empty((len(which), k), np.int32), np.zeros(len(which), np.bool_)
    run_in_pieces(
        _rescore, len(which), scores.shape[1] * rows.shape[1],
        rows, half_norms, which, scores, index, bound, unit, found, doubtful,
    )  # fmt: skip
    return found, doubtful


@njit(parallel=True, cache=True)
def _rescore(
    start: int,
    stop: int,
    rows: Floats,
    half_norms: Doubles,
    which: Indices,
    scores: Floats,
    index: Indices,
    bound: float,
    unit: float,
    found: Indices,
    doubtful: Flags,
) -> None:
    count, kept, k = len(rows), scores.shape[1], found.shape[1]
    for number in prange(start, stop):
        i = which[number]
        best = np.full(k, -np.inf, np.float64)
        best_index = np.full(k, count, np.int32)
        # A score lower by more than both errors cannot be among the k best.
        enough = np.sort(scores[number])[kept - k] - 2 * bound
        for place in range(kept):
            j = index[number, place]
            if scores[number, place] < enough and j != i:
                continue
            score = np.inf if j == i else dot(rows[i], rows[j]) - half_norms[j]
            if score > best[k - 1] or (score == best[k - 1] and j < best_index[k - 1]):
                _insert(score, j, best, best_index)
        found[number] = best_index
        missed = best[0] != np.inf or best[k - 1] * unit <= scores[number, 0] + bound
        doubtful[number] = missed and kept < count


def search_exactly(rows: Floats, half_norms: Doubles, which: Indices, k: int) -> Indices:
    """The nearest neighbours (n, k) of the rows `which`, with all scores in double precision."""
    found = np.empty((len(which), k), np.int32)
    run_in_pieces(_search_exactly, len(which), rows.size, rows, half_norms, which, found)
    return found


@njit(parallel=True, cache=True)
def _search_exactly(
    start: int, stop: int, rows: Floats, half_norms: Doubles, which: Indices, found: Indices
) -> None:
    count, k = len(rows), found.shape[1]
    for number in prange(start, stop):
        i = which[number]
        scores = np.full(k, -np.inf, np.float64)
        index = np.full(k, -1, np.int32)
        for j in range(count):
            score = np.inf if j == i else dot(rows[i], rows[j]) - half_norms[j]
            if score > scores[k - 1]:
                _insert(score, j, scores, index)
        found[number] = index


def all_finite(rows: Floats) -> bool:
    """Whether all numbers are finite; needs no mask as large as the rows."""
    finite = np.ones(len(rows), np.bool_)
    run_in_pieces(_finite_rows, *rows.shape, rows, finite)
    return bool(finite.all())


@njit(parallel=True, cache=True)
def _finite_rows(start: int, stop: int, rows: Floats, finite: Flags) -> None:
    for i in prange(start, stop):
        for value in rows[i]:
            if not np.isfinite(value):
                finite[i] = False
