"""The best candidates of each row, taken from tiles of scores while these are in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

from reid.neighbors.kernels import (
    Bytes,
    Floats,
    Indices,
)

Tile = npt.NDArray[Any]
"""Products or rows in float32, or as bits of bfloat16, which numpy lacks, in uint16."""
_CHUNK = 128
_STRIP = 64
_HALVINGS = 24
_NO_NANS = {"nnan", "nsz"}


@dataclass(frozen=True)
class Candidates:
    """The best candidates of n rows so far, in no order.

    A row has room for some candidates. When it is full, those that cannot be among the `k` nearest
    are dropped, and if none is, some of the worst. That takes a fraction of a heap's time, and
    the threshold of a row stays where the next score is compared with it.

    Attributes:
        scores: (n, room) float32, x.y - y.y / 2 or a bound above it: larger is nearer.
        index: (n, room) int32.
        filled: (n,) candidates of each row.
        lost: (n,) float32: no candidate that was left out has a higher score.
        slack: (n,) float32: a candidate whose score is below that of the k-th best by more than
            this is not among the k nearest.
        largest: Half the squared length of the longest vector: no score is much above it, and none
            below -4 times it.
        k: Neighbours that are looked for.
    """

    scores: Floats
    index: Indices
    filled: Indices
    lost: Floats
    slack: Floats
    largest: np.float32
    k: int

    @classmethod
    def empty(cls, room: int, count: int, slack: Floats, largest: float, k: int) -> Candidates:
        """Room for `room` candidates of each row, or for all `count` if these are fewer."""
        rows, room = len(slack), min(room, count)
        return cls(
            np.empty((rows, room), np.float32),
            np.empty((rows, room), np.int32),
            np.zeros(rows, np.int32),
            np.full(rows, -np.inf, np.float32),
            slack,
            np.float32(largest),
            k,
        )

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What the compiled code works on."""
        return self.scores, self.index, self.filled, self.lost, self.slack, self.largest, self.k


def tile_of(tensor: Tensor) -> Tile:
    """A tensor in float32 or bfloat16 for the compiled code; it shares the memory."""
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    tile: Tile = bits.numpy()
    return tile


def _widen(typing_context: Any, bits: Any) -> Any:
    """The float32 of the same value as a bfloat16, whose bits come as uint16."""
    from llvmlite import ir

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        wide = builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


_widen_bits: Any = intrinsic(_widen)


def _value(product: Any) -> Any:
    """A product as float32, be it float32 or the bits of a bfloat16."""
    if isinstance(product, np.uint16):
        return (np.uint32(product) << np.uint32(16)).view(np.float32)
    return product


@overload(_value)
def _overload_value(product: Any) -> Any:
    if product == types.uint16:

        def value(product: Any) -> Any:
            return _widen_bits(product)
    else:

        def value(product: Any) -> Any:
            return product

    return value


@njit(cache=True)
def _count_above(scores: Floats, limit: float) -> Any:
    above = np.uint32(0)  # a CPU adds 8 or 16 of these at a time
    for place in range(len(scores)):
        above = np.uint32(above + np.uint32(scores[place] > limit))
    return np.int64(above)


@njit(cache=True)
def _limits(scores: Floats, low: float, high: float, least: int, most: int) -> tuple[float, float]:
    """A limit that `least` to `most` scores are above, twice; or if none is found, two limits.

    Of the two, the lower one has more scores above it, or is `low`; the higher one has fewer, or is
    `high`. Halving the interval again and again takes a tenth of the time of a selection.
    """
    for _ in range(_HALVINGS):
        middle = np.float32(0.5) * (low + high)
        above = _count_above(scores, middle)
        if above > most:
            low = middle
        elif above < least:
            high = middle
        else:
            return middle, middle
    return low, high


@njit(cache=True)
def _new_limit(scores: Floats, low: float, high: float, room: int, k: int, slack: float) -> Any:
    """A limit that some fewer than `room` scores are above; the k best lie further above it.

    No score is below `low`, and few are above `high`.
    """
    keep = room - max(1, min(room // 8, (room - k) // 4))
    kth, _ = _limits(scores, low, high, k, min(k + k // 4 + 2, keep))
    limit = np.float32(kth - slack)
    if _count_above(scores, limit) > keep:
        _, limit = _limits(scores, max(limit, low), high, keep - (keep - k) // 4, keep)
    return limit


@njit(cache=True)
def _make_room(
    scores: Floats, index: Indices, lost: float, largest: float, k: int, slack: float
) -> tuple[int, float]:
    """Drops candidates of a full row; gives the number left, and the highest score left out."""
    low = max(lost, np.float32(-4) * largest)
    limit = _new_limit(scores, low, np.float32(1.1) * largest, len(scores), k, slack)
    left = 0
    for place in range(len(scores)):
        score, item = scores[place], index[place]
        scores[left] = score
        index[left] = item
        left += score > limit
    return left, limit


@njit(parallel=True, cache=True, fastmath=_NO_NANS)
def take_first(
    products: Tile,
    norms: Floats,
    places: Indices,
    right: int,
    scores: Floats,
    index: Indices,
    filled: Indices,
    lost: Floats,
    slack: Floats,
    largest: float,
    k: int,
) -> None:
    """Takes the first candidates of rows that have none yet.

    One new limit for a whole row of a block saves offering hundreds of its columns one by one.

    Args:
        products: (h, w) x.y, in float32 or as bits of bfloat16. Rows behind the n-th and columns
            behind the m-th do not count.
        norms: (m,) y.y / 2.
        places: (n,) numbers of the rows among the candidates.
        right: Number of the first column among all vectors.
        scores: As in `Candidates`, and so are the others.
        index: (n, room).
        filled: (n,).
        lost: (n,).
        slack: (n,).
        largest: Largest y.y / 2.
        k: Neighbours that are looked for.
    """
    width, room = len(norms), scores.shape[1]
    for r in prange(len(places)):
        i = places[r]
        line = np.empty(width, np.float32)
        for c in range(width):
            line[c] = _value(products[r, c]) - norms[c]
        limit = np.float32(-np.inf)
        if width > room:
            low, high = np.float32(-4) * largest, np.float32(1.1) * largest
            limit = _new_limit(line, low, high, room, k, slack[i])
        taken = 0
        for c in range(width):
            if line[c] > limit:
                scores[i, taken] = line[c]
                index[i, taken] = right + c
                taken += 1
        filled[i] = taken
        lost[i] = limit


@njit(parallel=True, cache=True, fastmath=_NO_NANS)
def offer_to_rows(
    products: Tile,
    row_norms: Floats,
    norms: Floats,
    limits: Floats,
    places: Indices,
    right: int,
    marks: Bytes,
    scores: Floats,
    index: Indices,
    filled: Indices,
    lost: Floats,
    slack: Floats,
    largest: float,
    k: int,
) -> None:
    """Offers the columns of a tile to the candidates of its rows; marks what its columns need.

    Args:
        products: (h, w) x.y, as in `take_first`.
        row_norms: (n,) x.x / 2.
        norms: (m,) y.y / 2.
        limits: (m,) columns need scores x.y - x.x / 2 above this; infinity: none.
        places: (n,) numbers of the rows among the candidates.
        right: Number of the first column among all vectors.
        marks: (n, chunks) becomes 1 where a chunk of a row holds scores that its columns need.
        scores: As in `Candidates`, and so are the others.
        index: (n, room).
        filled: (n,).
        lost: (n,).
        slack: (n,).
        largest: Largest y.y / 2.
        k: Neighbours that are looked for.
    """
    height = len(places)
    room = scores.shape[1]
    for strip in prange((height + _STRIP - 1) // _STRIP):
        hits = np.empty(_CHUNK, np.uint8)
        words = hits.view(np.uint64)
        for r in range(strip * _STRIP, min((strip + 1) * _STRIP, height)):
            i, mine = places[r], row_norms[r]
            for chunk in range(marks.shape[1]):
                start = chunk * _CHUNK
                norm, limit = norms[start : start + _CHUNK], limits[start : start + _CHUNK]
                product = products[r, start : start + len(norm)]
                least, wanted = lost[i], False
                for c in range(len(product)):  # without branches: 8 or 16 at a time
                    wanted |= _value(product[c]) > min(norm[c] + least, limit[c] + mine)
                marks[r, chunk] = wanted
                if not wanted:
                    continue
                wanted = False
                for c in range(len(product)):
                    hits[c] = _value(product[c]) - norm[c] > least
                    wanted |= _value(product[c]) > limit[c] + mine
                marks[r, chunk] = wanted
                hits[len(product) :] = 0
                for word in range(len(words)):
                    if not words[word]:
                        continue
                    for c in range(8 * word, 8 * word + 8):
                        if not hits[c]:
                            continue
                        score, place = _value(product[c]) - norm[c], filled[i]
                        if place == room:
                            place, least = _make_room(
                                scores[i], index[i], lost[i], largest, k, slack[i]
                            )
                            lost[i] = least
                        if score > least:
                            scores[i, place] = score
                            index[i, place] = right + start + c
                            place += 1
                        filled[i] = place


@njit(parallel=True, cache=True, fastmath=_NO_NANS)
def offer_to_columns(
    products: Tile,
    row_norms: Floats,
    left: int,
    right: int,
    marks: Bytes,
    scores: Floats,
    index: Indices,
    filled: Indices,
    lost: Floats,
    slack: Floats,
    largest: float,
    k: int,
) -> None:
    """Offers the rows of a tile to the candidates of its columns, where `marks` is 1.

    Args:
        products: (h, w), as in `take_first`.
        row_norms: (n,) x.x / 2.
        left: Number of the first row among all vectors.
        right: Number of the first column among the candidates.
        marks: (n, chunks).
        scores: As in `Candidates`, and so are the others.
        index: (n, room).
        filled: (n,).
        lost: (n,).
        slack: (n,).
        largest: Largest y.y / 2.
        k: Neighbours that are looked for.
    """
    height, width = products.shape
    room = scores.shape[1]
    for chunk in prange(marks.shape[1]):
        start = chunk * _CHUNK
        first = right + start
        hits = np.zeros(_CHUNK, np.uint8)
        words = hits.view(np.uint64)
        limit = lost[first : first + min(_CHUNK, width - start)].copy()
        for r in range(height):
            if not marks[r, chunk]:
                continue
            product, mine = products[r, start : start + _CHUNK], row_norms[r]
            for c in range(len(limit)):
                hits[c] = _value(product[c]) - mine > limit[c]
            for word in range(len(words)):
                if not words[word]:
                    continue
                for c in range(8 * word, 8 * word + 8):
                    if not hits[c]:
                        continue
                    score, i = _value(product[c]) - mine, first + c
                    place = filled[i]
                    if place == room:
                        place, limit[c] = _make_room(
                            scores[i], index[i], lost[i], largest, k, slack[i]
                        )
                        lost[i] = limit[c]
                    if score > limit[c]:
                        scores[i, place] = score
                        index[i, place] = left + r
                        place += 1
                    filled[i] = place


def chunks_of(width: int) -> int:
    """Chunks of a row of a tile."""
    return -(-width // _CHUNK)
