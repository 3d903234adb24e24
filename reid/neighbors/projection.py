"""Shorter vectors whose products bound those of the vectors themselves from above."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from reid.neighbors.kernels import Doubles, Floats

_ROWS = 4096
_SAMPLE = 2048


@dataclass(frozen=True)
class Lengths:
    """What the bound of products of projected rows depends on.

    Attributes:
        longest: The largest squared length of a vector.
        whole: That of a projected row, as it is stored.
        moved: The largest squared distance by which rounding has moved one.
    """

    longest: float = 0.0
    whole: float = 0.0
    moved: float = 0.0

    def joined(self, other: Lengths) -> Lengths:
        """Those of both parts of some rows."""
        return Lengths(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))

    def bound(self, width: int, kind: torch.dtype) -> float:
        """By how much a product of rows of this width and type may be below that of the vectors.

        It holds the rounding of the rows and of the sum and, for bfloat16, of the product.
        """
        largest, moved = math.sqrt(self.whole), math.sqrt(self.moved)
        inputs = moved * (2 * largest + moved)
        sums = (width + 4) * 2.0**-22 * self.whole
        product = bfloat16_error(self.longest) if kind == torch.bfloat16 else 0.0
        return 1.0001 * (inputs + sums + product) + 1e-12 * self.whole


@dataclass(frozen=True)
class Projected:
    """Rows in few dimensions, for an upper bound of their products.

    With an orthogonal projection to x' and the length r_x of what it leaves of x, the inequality of
    Cauchy and Schwarz says x.y <= x'.y' + r_x r_y. So a row is x' with r_x behind it: the product
    of two such rows bounds that of the vectors.

    Attributes:
        rows: (N, width) float32 or bfloat16.
        rest: (N,) float32, r.
        lengths: Of vectors and rows.
    """

    rows: Tensor
    rest: Floats
    lengths: Lengths

    @property
    def bound(self) -> float:
        """x.y is never above the product of two rows, as computed, by more than this."""
        return self.lengths.bound(self.rows.shape[1], self.rows.dtype)


def principal_axes(rows: Floats) -> tuple[Doubles, Doubles]:
    """The principal axes (D, D) of some of the rows, as columns, and the share (D,) of each.

    The rows are not centred: products are to be kept, not variances. Computed in double precision;
    the columns are orthogonal to about 1e-15.
    """
    some = rows
    if len(rows) > _SAMPLE:
        some = rows[np.random.default_rng(0).choice(len(rows), _SAMPLE, replace=False)]
    some = some.astype(np.float64)
    values, axes = np.linalg.eigh(some.T @ some)
    values = np.maximum(values[::-1], 0)
    return np.ascontiguousarray(axes[:, ::-1]), values / max(float(values.sum()), 1e-300)


def bfloat16_error(largest: float) -> float:
    """By how much rounding to bfloat16 may lower a product that cannot be above `largest`.

    Below 2^e, bfloat16 has numbers at distances of up to 2^(e - 8). A product that is rounded to
    the first power of two from `largest` on, or above, was not lowered.
    """
    return 2.0 ** (math.frexp(largest * (1 - 1e-5))[1] - 9) + 1e-5 * largest


def project(rows: Floats, axes: Doubles, kind: torch.dtype) -> Projected:
    """The rows (N, D) on the axes (D, width - 1), computed in double precision, then rounded.

    Lengths of rests are rounded up.
    """
    count, width = len(rows), axes.shape[1] + 1
    up = 1 + (2.0**-7 if kind == torch.bfloat16 else 2.0**-22)
    short = torch.empty(count, width, dtype=kind)
    rest = np.empty(count, np.float32)
    longest = whole = moved = 0.0
    for start in range(0, count, _ROWS):
        part = rows[start : start + _ROWS].astype(np.float64)
        onto = np.empty((len(part), width))
        np.matmul(part, axes, out=onto[:, :-1])
        squares = np.einsum("nd,nd->n", part, part)
        longest = max(longest, float(squares.max()))
        left = squares - np.einsum("nd,nd->n", onto[:, :-1], onto[:, :-1])
        # The difference of two squares is off by some 1e-16 of them.
        onto[:, -1] = np.sqrt(np.maximum(left, 0) + 1e-13 * squares) * up
        block = short[start : start + _ROWS]
        block.copy_(torch.from_numpy(onto))
        rest[start : start + _ROWS] = onto[:, -1]
        stored = block.double().numpy()
        onto -= stored
        moved = max(moved, float(np.einsum("nd,nd->n", onto[:, :-1], onto[:, :-1]).max()))
        whole = max(whole, float(np.einsum("nd,nd->n", stored, stored).max()))
    return Projected(short, rest, Lengths(longest, whole, moved))
