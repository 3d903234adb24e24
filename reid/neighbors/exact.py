"""The exact search: candidates of each row, a bound on their rounding errors, certified lists."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reid.instructions import fast_bfloat16
from reid.neighbors.candidates import (
    Candidates,
    Tile,
    chunks_of,
    offer_to_columns,
    offer_to_rows,
    take_first,
)
from reid.neighbors.kernels import (
    Bytes,
    Doubles,
    Floats,
    Indices,
    half_squared_norms,
    search_exactly,
)
from reid.neighbors.plan import Plan, plan_search
from reid.neighbors.projection import bfloat16_error, project
from reid.neighbors.rescoring import rescore
from reid.structures import ProgressBar

logger = logging.getLogger(__name__)
BLOCK_SIZE = 2048
MARGIN = 12
HALF_MARGIN = 42
_SLACK = 2.5
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
    dims: int | None = None


def neighbors_of(task: SearchTask, first: int, last: int, progress: ProgressBar | None) -> Indices:
    """The neighbour lists (last - first, k) of the rows from `first` to `last`, among all rows.

    The first search is the cheapest one that pays: with projected rows, with all of them in half
    precision, or in single precision. Rows in doubt are searched again, each time more exactly.
    """
    half_norms = half_squared_norms(task.rows)
    power = _power_to_one(half_norms)
    scaled = np.ldexp(task.rows, power) if power else task.rows
    scaled_norms, unit = np.ldexp(half_norms, 2 * power), 2.0 ** (2 * power)
    half = task.half_precision
    if half is None:
        half = fast_bfloat16(task.device)
    plain = Plan(0, task.k + (HALF_MARGIN if half else MARGIN), half)
    plan = plain
    if task.device != "cuda" and task.dims != 0:
        spare = 2 * task.rows.shape[1] + 8 * (task.k + HALF_MARGIN) - 8
        plan = plan_search(scaled, scaled_norms, task.k, last - first, plain, task.dims, spare)
    if plan.dims:
        logger.info("The search for neighbours compares %d of %d dimensions first, then "
                    "the nearest in all", plan.dims, task.rows.shape[1])  # fmt: skip
    plans = [plan] + [plain] * (plan.dims > 0) + [Plan(0, task.k + MARGIN, False)] * half
    found = np.empty((last - first, task.k), np.int32)
    if first == last:
        return found
    which = np.arange(first, last, dtype=np.int32)
    for number, plan in enumerate(plans):
        bound, candidates = _candidates(
            task, plan, scaled, scaled_norms, which, progress, some=number > 0
        )
        found[which - first], doubtful = rescore(
            task.rows, half_norms, which, candidates, bound, unit
        )
        del candidates
        which = which[doubtful]
        if not len(which):
            return found
    found[which - first] = search_exactly(task.rows, half_norms, which, task.k)
    return found


def _candidates(
    task: SearchTask,
    plan: Plan,
    rows: Floats,
    half_norms: Doubles,
    which: Indices,
    progress: ProgressBar | None,
    some: bool,
) -> tuple[float, Candidates]:
    """By how much their scores may be too low, and candidates of the rows `which` among all rows.

    Without `some`, `which` are rows that follow each other.
    """
    tensor, bound, slack = _bounded(plan, rows, half_norms, which)
    norms = half_norms.astype(np.float32)
    found = Candidates.empty(plan.room, len(rows), slack, float(norms.max()), task.k)
    if some:
        _search_some(tensor, norms, which, task.block_size, found)
    elif task.device == "cuda":
        on_gpu = tensor.cuda(), torch.from_numpy(norms).cuda()
        _search_on_gpu(*on_gpu, int(which[0]), task.block_size, found, progress)
    else:
        _search(tensor, norms, int(which[0]), task.block_size, found, progress)
    return bound, found


def _bounded(
    plan: Plan, rows: Floats, half_norms: Doubles, which: Indices
) -> tuple[Tensor, float, Floats]:
    """What is multiplied, by how much scores may be too low, and the slack of the rows `which`."""
    if plan.dims:
        assert plan.axes is not None
        projected = project(rows, plan.axes, plan.kind)
        bound = projected.bound + _rounding_bound(4, half_norms)
        rest = projected.rest
        slack = np.float32(2) * rest[which] * rest.max() + np.float32(_SLACK * bound)
        return projected.rows, bound, slack
    tensor = torch.from_numpy(rows)
    if plan.half:
        tensor = tensor.bfloat16()
        bound = _half_rounding_bound(rows, tensor, half_norms)
    else:
        bound = _rounding_bound(rows.shape[1], half_norms)
    return tensor, bound, np.full(len(which), _SLACK * bound, np.float32)


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
    |x - x'| |y'| + |x| |y - y'|; the product itself is rounded to bfloat16 too.
    """
    largest = float(np.sqrt(2 * half_norms.max()))
    residual = 0.0
    for start in range(0, len(rows), BLOCK_SIZE):
        part = torch.from_numpy(rows[start : start + BLOCK_SIZE])
        error = (part - halves[start : start + BLOCK_SIZE].float()).square().sum(1).sqrt().max()
        residual = max(residual, float(error))
    rounded = largest + residual
    product = bfloat16_error(largest * largest)
    inputs = 1.0001 * residual * (largest + rounded)
    sums = rows.shape[1] * 2.0**-22 * rounded * rounded
    return float(inputs + sums + product + _rounding_bound(4, half_norms))


class _Tiles:
    """Products of blocks of rows, offered to candidates tile by tile, while these are cached."""

    def __init__(
        self, tensor: Tensor, half_norms: Floats, block_size: int, found: Candidates
    ) -> None:
        self._tensor, self._norms, self._found = tensor, half_norms, found
        self.height = min(block_size, len(tensor))
        # A quarter of the rows, so that a tile of a usual block takes 2 MB
        self.width = max(1, self.height // 4)
        self._products = torch.empty(self.height**2, dtype=tensor.dtype)
        self._marks = np.empty(self.height * chunks_of(self.width), np.uint8)
        self._nothing = np.full(self.width, np.inf, np.float32)

    def first(self, one: Tensor, right: int, place: int) -> int:
        """Takes the first candidates of `one`, which begin at `place`, from the rows at `right`."""
        stop = min(right + self.height, len(self._tensor))
        take_first(
            self._multiply(one, right, stop), self._norms[right:stop], place, right,
            *self._found.arrays,
        )  # fmt: skip
        return stop

    def offer(self, one: Tensor, norms: Floats, right: int, stop: int, place: int) -> None:
        """Offers the rows from `right` to `stop` to `one`, whose candidates begin at `place`."""
        for start in range(right, stop, self.width):
            end = min(start + self.width, stop)
            self._offer(one, norms, start, end, place, self._nothing[: end - start])

    def offer_to_all(self, left: int, end: int, right: int, stop: int, first: int) -> None:
        """Offers the rows left:end and right:stop to each other; candidates begin at `first`."""
        one, norms = self._tensor[left:end], self._norms[left:end]
        for start in range(right, stop, self.width):
            columns = slice(start - first, min(start + self.width, stop) - first)
            limits = self._found.lost[columns].copy()
            tile, marks = self._offer(one, norms, start, columns.stop + first, left - first, limits)
            offer_to_columns(tile, norms, left, columns.start, marks, *self._found.arrays)

    def _offer(
        self, one: Tensor, norms: Floats, right: int, stop: int, place: int, limits: Floats
    ) -> tuple[Tile, Bytes]:
        tile = self._multiply(one, right, stop)
        shape = len(one), chunks_of(stop - right)
        marks = self._marks[: shape[0] * shape[1]].reshape(shape)
        offer_to_rows(
            tile, norms, self._norms[right:stop], limits, place, right, marks, *self._found.arrays
        )
        return tile, marks

    def _multiply(self, one: Tensor, right: int, stop: int) -> Tile:
        shape = len(one), stop - right
        products = self._products[: shape[0] * shape[1]].view(shape)
        torch.mm(one, self._tensor[right:stop].T, out=products)
        bits = products.view(torch.uint16) if products.dtype == torch.bfloat16 else products
        tile: Tile = bits.numpy()
        return tile


def _search(
    tensor: Tensor,
    half_norms: Floats,
    first: int,
    block_size: int,
    found: Candidates,
    progress: ProgressBar | None,
) -> None:
    """Fills `found`: candidates of its rows, which start at row `first`, among all rows.

    Each pair of blocks of these rows is multiplied only once.
    """
    count, last = len(tensor), first + len(found.scores)
    tiles = _Tiles(tensor, half_norms, block_size, found)
    blocks = [(left, min(left + block_size, last)) for left in range(first, last, block_size)]
    pairs = 0
    for left, end in blocks:
        tiles.first(tensor[left:end], left, left - first)
    for left, end in blocks:
        one, norms = tensor[left:end], half_norms[left:end]
        done = min(left + tiles.height, count)
        tiles.offer(one, norms, 0, first, left - first)
        tiles.offer_to_all(left, end, end, last, first)
        tiles.offer(one, norms, max(last, done), count, left - first)
        pairs += len(one) * (first + (end - left) + 2 * (last - end) + count - last)
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
    found: Candidates,
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
            found.scores[own] = scores.cpu().numpy()
            found.index[own] = index.cpu().numpy()
            found.filled[own] = kept
            if kept < len(tensor):
                found.lost[own] = found.scores[own, -1]
            if progress is not None:
                progress(len(tensor) * own.stop // len(found.scores), len(tensor))


def _search_some(
    tensor: Tensor, half_norms: Floats, which: Indices, block_size: int, found: Candidates
) -> None:
    """Finds candidates of some rows among all."""
    tiles = _Tiles(tensor, half_norms, block_size, found)
    for left in range(0, len(which), block_size):
        part = which[left : left + block_size]
        one, norms = tensor[torch.from_numpy(part.astype(np.int64))], half_norms[part]
        done = tiles.first(one, 0, left)
        tiles.offer(one, norms, done, len(tensor), left)
