"""Compiled loops of the exact search, and the types of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic
from torch import Tensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
AnyFloats = npt.NDArray[Any]
Indices = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
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
def insert(value: float, item: int, scores: npt.NDArray[Any], index: Indices) -> None:
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


def _sums(typing_context: Any, one: Any, other: Any) -> Any:
    """Sums of products at places 0, 8, 16 and so on, at 1, 9, 17 and so on, up to 7.

    As one vector of 8 numbers, which LLVM does not find by itself: three to four times as fast.
    """
    from llvmlite import ir

    build: Any = cgutils
    tuples: Any = types.UniTuple
    if one.layout != "C" or other.layout != "C":
        raise TypingError(f"expected contiguous rows, got {one} and {other}")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        singles = ir.VectorType(ir.FloatType(), 8)
        doubles = ir.VectorType(ir.DoubleType(), 8)
        rows = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        sums = build.alloca_once_value(builder, ir.Constant(doubles, None))
        length = builder.extract_value(rows[0].shape, 0)
        with build.for_range(builder, builder.lshr(length, length.type(3))) as loop:
            start = builder.shl(loop.index, loop.index.type(3))
            factors = []
            for row in rows:
                place = builder.bitcast(builder.gep(row.data, [start]), singles.as_pointer())
                factors.append(builder.fpext(builder.load(place, align=4), doubles))
            product = builder.fmul(*factors)
            builder.store(builder.fadd(builder.load(sums), product), sums)
        total = builder.load(sums)
        lanes = [builder.extract_element(total, ir.IntType(32)(lane)) for lane in range(8)]
        return context.make_tuple(builder, signature.return_type, lanes)

    return tuples(types.float64, 8)(one, other), generate


_eight_sums: Any = intrinsic(_sums)


@njit(cache=True)
def dot(one: Floats, other: Floats) -> float:
    """Inner product in double precision, in the same order of additions on every machine.

    Products of single-precision numbers are exact in double precision, so fused multiply-adds
    change nothing.
    """
    a, b, c, d, e, f, g, h = _eight_sums(one, other)
    dim = len(one)
    for x in range(dim - dim % 8, dim):
        a += np.float64(one[x]) * np.float64(other[x])
    total: float = ((a + e) + (c + g)) + ((b + f) + (d + h))
    return total


def half_squared_norms(rows: Floats) -> Doubles:
    """Half the squared length of each row (N,)."""
    norms = np.empty(len(rows), np.float64)
    run_in_pieces(_half_squared_norms, *rows.shape, rows, norms)
    return norms


@njit(parallel=True, cache=True)
def _half_squared_norms(start: int, stop: int, rows: Floats, norms: Doubles) -> None:
    for i in prange(start, stop):
        norms[i] = 0.5 * dot(rows[i], rows[i])


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
                insert(score, j, scores, index)
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
