"""The exact search: candidates of each row, a bound on their rounding errors, certified lists."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from reid.instructions import fast_bfloat16
from reid.neighbors.candidates import Candidates
from reid.neighbors.kernels import (
    Doubles,
    Floats,
    Indices,
    half_squared_norms,
    search_exactly,
)
from reid.neighbors.order import FEWEST, near_order, rename, reorder
from reid.neighbors.plan import Plan, plan_search
from reid.neighbors.projection import bfloat16_error, project
from reid.neighbors.rescoring import rescore
from reid.neighbors.tiles import search_rows, search_some
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


@dataclass(frozen=True)
class Compared:
    """What candidates are looked for in.

    Attributes:
        half_norms: (N,) half the squared lengths of the vectors.
        norms: (N,) those of the rows that are multiplied.
        unit: The second divided by the first, a power of two.
        bounded: For a plan and some rows: what is multiplied, by how much its scores may be too
            low, and the slack (n,) of these rows.
    """

    half_norms: Doubles
    norms: Floats
    unit: float
    bounded: Callable[[Plan, Indices], tuple[Tensor, float, Floats]]


def neighbors_of(task: SearchTask, first: int, last: int, progress: ProgressBar | None) -> Indices:
    """The neighbour lists (last - first, k) of the rows from `first` to `last`, among all rows.

    The first search is the cheapest one that pays: with projected rows, with all of them in half
    precision, or in single precision. Rows in doubt are searched again, each time more exactly.
    """
    scaled, scaled_norms, compared = prepare(task.rows)
    plan = choose_plan(task, scaled, scaled_norms, last - first)
    if first == last:
        return np.empty((0, task.k), np.int32)
    which = np.arange(first, last, dtype=np.int32)
    bound, candidates, which = _candidates(task, plan, compared, which, progress, some=False)
    lists, doubtful = rescore(
        task.rows, compared.half_norms, which, candidates, bound, compared.unit
    )
    del candidates
    found = np.empty_like(lists)
    found[which - first] = lists
    again = which[doubtful]
    found[again - first] = search_again(task, plans_after(plan, task.k), compared, again)
    return found


def prepare(rows: Floats) -> tuple[Floats, Doubles, Compared]:
    """The rows scaled to a length near 1, half their squared lengths, and what is compared.

    They are scaled only where squares could overflow or underflow; or else they are `rows`.
    """
    half_norms = half_squared_norms(rows)
    power = _power_to_one(half_norms)
    scaled = np.ldexp(rows, power) if power else rows
    norms, unit = np.ldexp(half_norms, 2 * power), 2.0 ** (2 * power)
    compared = Compared(
        half_norms, norms.astype(np.float32), unit, partial(_bounded, scaled, norms)
    )
    return scaled, norms, compared


def choose_plan(task: SearchTask, rows: Floats, half_norms: Doubles, own: int) -> Plan:
    """How candidates of `own` rows are found: the way that takes the least time.

    Args:
        task: The search.
        rows: (N, D) its vectors, the longest of about length 1.
        half_norms: (N,).
        own: How many rows.
    """
    plan = first_plan(task)
    if task.device != "cuda" and task.dims != 0:
        spare = 2 * rows.shape[1] + 8 * (task.k + HALF_MARGIN) - 8
        plan = plan_search(rows, half_norms, task.k, own, plan, task.dims, spare)
    if plan.dims:
        logger.info("The search for neighbours compares %d of %d dimensions first, then "
                    "the nearest in all", plan.dims, rows.shape[1])  # fmt: skip
    return plan


def first_plan(task: SearchTask) -> Plan:
    """The search without a projection, in the type of the task or else the fastest one here."""
    half = task.half_precision
    return _plain(task.k, fast_bfloat16(task.device) if half is None else half)


def search_again(
    task: SearchTask, plans: list[Plan], compared: Compared, which: Indices
) -> Indices:
    """The lists (n, k) of rows in doubt, searched more exactly each time, at last one by one.

    Args:
        task: The search.
        plans: How they are searched, one after the other.
        compared: What is searched.
        which: (n,) the rows.
    """
    found, left = np.empty((len(which), task.k), np.int32), np.arange(len(which))
    for plan in plans:
        if not len(left):
            return found
        part = which[left]
        bound, candidates, _ = _candidates(task, plan, compared, part, None, some=True)
        found[left], doubtful = rescore(
            task.rows, compared.half_norms, part, candidates, bound, compared.unit
        )
        left = left[doubtful]
    found[left] = search_exactly(task.rows, compared.half_norms, which[left], task.k)
    return found


def plans_after(plan: Plan, k: int) -> list[Plan]:
    """How rows are searched again that are in doubt after a plan: each time more exactly."""
    return [_plain(k, plan.half)] * (plan.dims > 0) + [_plain(k, False)] * plan.half


def _plain(k: int, half: bool) -> Plan:
    """The search without a projection."""
    return Plan(0, k + (HALF_MARGIN if half else MARGIN), half)


def _candidates(
    task: SearchTask,
    plan: Plan,
    compared: Compared,
    which: Indices,
    progress: ProgressBar | None,
    some: bool,
) -> tuple[float, Candidates, Indices]:
    """By how much scores may be too low, candidates among all rows, and the rows that they are for.

    Without `some`, the rows `which` must follow each other; they may come back in another order.
    """
    tensor, bound, slack = compared.bounded(plan, which)
    norms, first, order = compared.norms, int(which[0]), None
    if not some and plan.copies and task.device != "cuda" and len(norms) >= FEWEST:
        order = near_order(tensor, norms, first, first + len(which))
        reorder(tensor, order)
        norms, which = norms[order], order[first : first + len(which)]
        slack = slack[which - first]
    found = Candidates.empty(plan.room, len(norms), slack, float(norms.max()), task.k)
    if some:
        search_some(tensor, norms, which, task.block_size, found, plan.kind)
    elif task.device == "cuda":
        on_gpu = tensor.cuda(), torch.from_numpy(norms).cuda()
        _search_on_gpu(*on_gpu, first, task.block_size, found, progress)
    else:
        search_rows(tensor, norms, first, task.block_size, found, progress)
    if order is not None:
        rename(found.index, found.filled, order)
    return bound, found, which


def _bounded(
    rows: Floats, half_norms: Doubles, plan: Plan, which: Indices
) -> tuple[Tensor, float, Floats]:
    """See `Compared`."""
    largest = float(half_norms.max())
    if plan.dims:
        assert plan.axes is not None
        projected = project(rows, plan.axes, plan.kind)
        bound = projected.bound + rounding_bound(4, largest)
        return projected.rows, bound, slack_of(bound, projected.rest[which], projected.rest.max())
    tensor = torch.from_numpy(rows)
    if plan.half:
        tensor = tensor.bfloat16()
        bound = half_rounding_bound(rows.shape[1], largest, largest_rounding(rows, tensor))
    else:
        bound = rounding_bound(rows.shape[1], largest)
    return tensor, bound, slack_of(bound, np.zeros(len(which), np.float32), 0.0)


def slack_of(bound: float, rest: Floats, largest_rest: float) -> Floats:
    """By how much a score may lie below that of the k-th best, and its row still be as near (n,).

    Args:
        bound: By how much scores may be too low.
        rest: (n,) what a projection leaves of the rows, or zeros.
        largest_rest: The most that it leaves of any row.
    """
    slack: Floats = np.float32(2) * rest * np.float32(largest_rest) + np.float32(_SLACK * bound)
    return slack


def _power_to_one(half_norms: Doubles) -> int:
    """The power of two that scales the longest row to about 1, or 0 if no scaling is needed.

    Far from 1, squares overflow or underflow in single precision. Within a factor of 2^32 they do
    not, and the rows need not be copied.
    """
    exponent = math.frexp(math.sqrt(2 * float(half_norms.max())))[1]
    return -exponent if abs(exponent) > _SAFE_EXPONENT else 0


def rounding_bound(dim: int, largest: float) -> float:
    """Largest error of a single-precision score x.y - y.y / 2; `largest` is the largest y.y / 2."""
    unit = 2.0**-24
    return (dim + 4) * unit / (1 - (dim + 4) * unit) * 4 * largest


def largest_rounding(rows: Floats, halves: Tensor) -> float:
    """The largest distance by which rounding has moved one of the rows (N, D)."""
    residual = 0.0
    for start in range(0, len(rows), BLOCK_SIZE):
        part = torch.from_numpy(rows[start : start + BLOCK_SIZE])
        error = (part - halves[start : start + BLOCK_SIZE].float()).square().sum(1).sqrt().max()
        residual = max(residual, float(error))
    return residual


def half_rounding_bound(dim: int, largest: float, residual: float) -> float:
    """Largest error of a score with products in bfloat16 and sums in float32.

    By the Cauchy-Schwarz inequality, rounding x and y moves their product by no more than
    |x - x'| |y'| + |x| |y - y'|; the product itself is rounded to bfloat16 too.

    Args:
        dim: D.
        largest: Half the largest squared length.
        residual: See `largest_rounding`.
    """
    length = math.sqrt(2 * largest)
    rounded = length + residual
    product = bfloat16_error(length * length)
    inputs = 1.0001 * residual * (length + rounded)
    sums = dim * 2.0**-22 * rounded * rounded
    return inputs + sums + product + rounding_bound(4, largest)


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
    """`search_rows` with torch on the device of `tensor`: merges the best scores of each block."""
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
