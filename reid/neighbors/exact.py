"""The exact search: candidates of each row, a bound on their rounding errors, certified lists."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reid.neighbors.kernels import (
    Doubles,
    Floats,
    Indices,
    half_squared_norms,
    rescore,
    search_exactly,
    take_columns,
    take_rows,
)
from reid.structures import ProgressBar

BLOCK_SIZE = 2048
MARGIN = 12
HALF_MARGIN = 44
_BFLOAT16_TESTS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
_GPU_COLUMNS = 65536
_SAFE_EXPONENT = 32


@dataclass(frozen=True)
class SearchTask:
    """The arguments of `nearest_neighbors`, checked; rows are (N, D)."""

    rows: Floats
    k: int
    block_size: int
    half_precision: bool | None
    device: str


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether a `cpu` (AVX-512 BF16 or AMX) or `cuda` device has bfloat16 instructions."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tests = (getattr(torch.cpu, name, None) for name in _BFLOAT16_TESTS)
    return any(bool(test()) for test in tests if test is not None)


def neighbors_of(task: SearchTask, first: int, last: int, progress: ProgressBar | None) -> Indices:
    """The neighbour lists (last - first, k) of the rows from `first` to `last`, among all rows."""
    rows, k, block_size = task.rows, task.k, task.block_size
    count = len(rows)
    half_norms = half_squared_norms(rows)
    power = _power_to_one(half_norms)
    scaled = np.ldexp(rows, power) if power else rows
    scaled_norms, unit = np.ldexp(half_norms, 2 * power), 2.0 ** (2 * power)
    half_precision = task.half_precision
    if half_precision is None:
        half_precision = fast_bfloat16(task.device)
    own = np.arange(first, last, dtype=np.int32)
    searched = _Candidates.empty(len(own), k + (HALF_MARGIN if half_precision else MARGIN), count)
    tensor = torch.from_numpy(scaled)
    if half_precision:
        tensor = tensor.bfloat16()
        bound = _half_rounding_bound(scaled, tensor, scaled_norms)
    else:
        bound = _rounding_bound(rows.shape[1], scaled_norms)
    norms = scaled_norms.astype(np.float32)
    if task.device == "cuda":
        on_gpu = tensor.cuda(), torch.from_numpy(norms).cuda()
        _search_on_gpu(*on_gpu, first, block_size, searched, progress)
        del on_gpu
    else:
        _search(tensor, norms, first, block_size, searched, progress)
    found, doubtful = rescore(
        rows, half_norms, own, searched.scores, searched.index, k, bound, unit
    )
    del searched, tensor
    if half_precision and doubtful.any():
        which = own[doubtful]
        again = _Candidates.empty(len(which), k + MARGIN, count)
        _search_some(scaled, norms, which, block_size, again)
        bound = _rounding_bound(rows.shape[1], scaled_norms)
        found[doubtful], still = rescore(
            rows, half_norms, which, again.scores, again.index, k, bound, unit
        )
        doubtful[doubtful] = still
    found[doubtful] = search_exactly(rows, half_norms, own[doubtful], k)
    return found


@dataclass(frozen=True)
class _Candidates:
    """The best candidates of each row so far, as heaps with the worst one first.

    Attributes:
        scores: (n, kept) float32, x.y - y.y / 2: larger is nearer.
        index: (n, kept) int32.
    """

    scores: Floats
    index: Indices

    @classmethod
    def empty(cls, num_rows: int, kept: int, count: int) -> _Candidates:
        kept = min(kept, count)
        return cls(
            np.full((num_rows, kept), -np.inf, np.float32), np.full((num_rows, kept), -1, np.int32)
        )


def _power_to_one(half_norms: Doubles) -> int:
    """The power of two that scales the longest row to about 1, or 0 if no scaling is needed.

    Far from 1, squares overflow or underflow in single precision. Within a factor of 2^32 they do
    not, and the rows need not be copied.
    """
    exponent = math.frexp(math.sqrt(2 * float(half_norms.max())))[1]
    return -exponent if abs(exponent) > _SAFE_EXPONENT else 0


def _rounding_bound(dim: int, half_norms: Doubles) -> float:
    """Largest error of a single-precision score x.y - y.y / 2."""
    unit = 2.0**-24
    return (dim + 4) * unit / (1 - (dim + 4) * unit) * 4 * float(half_norms.max())


def _half_rounding_bound(rows: Floats, halves: Tensor, half_norms: Doubles) -> float:
    """Largest error of a score with products in bfloat16 and sums in float32.

    By the Cauchy-Schwarz inequality, rounding x and y moves their product by no more than
    |x - x'| |y'| + |x| |y - y'|; the product itself is rounded to bfloat16 (2^-9 of it).
    """
    largest = float(np.sqrt(2 * half_norms.max()))
    residual = 0.0
    for start in range(0, len(rows), BLOCK_SIZE):
        part = torch.from_numpy(rows[start : start + BLOCK_SIZE])
        error = (part - halves[start : start + BLOCK_SIZE].float()).square().sum(1).sqrt().max()
        residual = max(residual, float(error))
    rounded = largest + residual
    product = rounded * rounded * (1 + rows.shape[1] * 2.0**-22)
    inputs = 1.0001 * residual * (largest + rounded)
    sums = rows.shape[1] * 2.0**-22 * rounded * rounded
    return float(inputs + sums + 2.0**-9 * product + _rounding_bound(4, half_norms))


def _search(
    tensor: Tensor,
    half_norms: Floats,
    first: int,
    block_size: int,
    found: _Candidates,
    progress: ProgressBar | None,
) -> None:
    """Fills `found`: candidates of its rows, which start at row `first`, among all rows.

    Each pair of blocks of these rows is multiplied only once.
    """
    count, last = len(tensor), first + len(found.scores)
    side = min(block_size, count)
    products = torch.empty(side * side, dtype=tensor.dtype)
    scores = products if tensor.dtype == torch.float32 else products.float()
    pairs = 0
    for left in range(first, last, block_size):
        one = tensor[left : min(left + block_size, last)]
        for start, stop in ((0, first), (left, last), (last, count)):
            for right in range(start, stop, block_size):
                other = tensor[right : min(right + block_size, stop)]
                shape, size = (len(one), len(other)), len(one) * len(other)
                torch.mm(one, other.T, out=products[:size].view(shape))
                if scores is not products:
                    scores[:size] = products[:size]
                block = scores[:size].view(shape).numpy()
                take_rows(block, half_norms, left - first, right, found.scores, found.index)
                pairs += size
                if start == left and right != left:  # both blocks hold rows of `found`
                    take_columns(block, half_norms, left, right - first, found.scores, found.index)
                    pairs += size
                if progress is not None:
                    progress(pairs // (last - first), count)


@contextlib.contextmanager
def _exact_sums() -> Iterator[None]:
    """Makes matrix products as the rounding bounds assume: no TF32, sums in single precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


def _search_on_gpu(
    tensor: Tensor,
    half_norms: Tensor,
    first: int,
    block_size: int,
    found: _Candidates,
    progress: ProgressBar | None,
) -> None:
    """`_search` with torch on the device of `tensor`: merges the best scores of each block."""
    kept = found.scores.shape[1]
    with _exact_sums():
        for left in range(0, len(found.scores), block_size):
            own = slice(left, min(left + block_size, len(found.scores)))
            one = tensor[first + own.start : first + own.stop]
            scores = torch.full((len(one), kept), -torch.inf, device=tensor.device)
            index = torch.full((len(one), kept), -1, dtype=torch.int32, device=tensor.device)
            for right in range(0, len(tensor), _GPU_COLUMNS):
                other = slice(right, right + _GPU_COLUMNS)
                block = (one @ tensor[other].T).float() - half_norms[other]
                best, place = block.topk(min(kept, block.shape[1]), 1)
                both = torch.cat((scores, best), 1)
                indices = torch.cat((index, (place + right).int()), 1)
                scores, order = both.topk(kept, 1)
                index = indices.gather(1, order)
            # the worst first, as in a heap
            found.scores[own] = scores.flip(1).cpu().numpy()
            found.index[own] = index.flip(1).cpu().numpy()
            if progress is not None:
                progress(len(tensor) * own.stop // len(found.scores), len(tensor))


def _search_some(
    rows: Floats, half_norms: Floats, which: Indices, block_size: int, found: _Candidates
) -> None:
    """Finds candidates of some rows among all, in single precision."""
    tensor = torch.from_numpy(rows)
    for left in range(0, len(which), block_size):
        one = tensor[torch.from_numpy(which[left : left + block_size].astype(np.int64))]
        for right in range(0, len(rows), block_size):
            products = one @ tensor[right : right + block_size].T
            take_rows(products.numpy(), half_norms, left, right, found.scores, found.index)
