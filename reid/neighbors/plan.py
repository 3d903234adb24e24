"""Whether a search with projected rows pays, and in how many dimensions: a sample tells."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from reid.neighbors.kernels import Doubles, Floats, Labels
from reid.neighbors.projection import principal_axes

LEAST_PAIRS = 2**28
_WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512)
_MOST_ROOM = 192
_LARGEST_REST = 0.15
_FEWEST_COMPARED = 32768
_SURE = 0.75
_WORTH = 5
_COLUMNS = 8192
_GAIN = 0.9
# Seconds, measured on Sapphire Rapids and rounded; ratios matter, and differ little elsewhere.
_SCAN = 4e-10
_OFFER = 4e-8
_RESCORE = 5e-10
_PROJECT = 1e-10
_PLAN = 5e-6


@dataclass(frozen=True)
class Plan:
    """How candidates are found.

    Attributes:
        dims: Dimensions of the projected rows; 0: all, without a projection.
        room: Candidates of a row.
        half: Products in bfloat16.
        axes: (D, dims) orthogonal columns to project on.
    """

    dims: int
    room: int
    half: bool
    axes: Doubles | None = None

    @property
    def kind(self) -> torch.dtype:
        """The type of the rows that are multiplied."""
        return torch.bfloat16 if self.half else torch.float32

    @property
    def copies(self) -> bool:
        """Whether what is multiplied is a copy of the rows."""
        return self.half or self.dims > 0


def plan_search(
    rows: Floats, half_norms: Doubles, k: int, own: int, plain: Plan, dims: int | None, spare: int
) -> Plan:
    """The plan that takes the least time: `plain`, or one with projected rows.

    Some rows are compared with all, as they are and projected: that tells how many candidates the
    bound leaves, and so for how many rows the room would not do. Products are timed, since it
    depends on the CPU how much a shorter one saves. The time for this is about a hundredth of the
    search's. Features without main directions are known by their axes, before anything is compared.

    Args:
        rows: (N, D), the longest of about length 1.
        half_norms: (N,).
        k: Neighbours that are looked for.
        own: Rows whose neighbours are looked for.
        plain: The search without a projection.
        dims: Dimensions to project to; None: those that take the least time; 0 or D: all.
        spare: Bytes that a row may take, of its projection and its candidates.
    """
    count, dim = rows.shape
    if dims in (0, dim) or (dims is None and own * count < LEAST_PAIRS):
        return plain
    size = 2 if plain.half else 4
    if dims is not None:
        axes, _ = principal_axes(rows)
        room = min(3 * plain.room // 2, (spare - size * (dims + 1)) // 8)
        return replace(plain, dims=dims, room=max(room, plain.room), axes=axes[:, :dims].copy())
    widths = [width for width in _WIDTHS if 4 * width <= 3 * dim]
    seconds = {width: _seconds_of_pair(rows, width, plain.kind) for width in (*widths, dim)}
    compared = min(count, max(_FEWEST_COMPARED, count // 8))
    saved = own * (count - own / 2) * (seconds[dim] - min(seconds.values()))
    if saved < _WORTH * _PLAN * (compared + count / 4):
        return plain
    axes, shares = principal_axes(rows)
    if shares[widths[-1] - 1 :].sum() > _LARGEST_REST:
        return plain
    needed = _needed(rows, half_norms, axes, widths, k, plain, compared)
    best = replace(plain, dims=0)
    least = _GAIN * _cost(best, np.zeros(1), dim, count, own, seconds)
    for width, numbers in zip(widths, needed, strict=True):
        most = min(_MOST_ROOM, (spare - size * width) // 8)
        for room in range(plain.room, most + 1, 16):
            plan = replace(plain, dims=width - 1, room=room)
            cost = _cost(plan, numbers, dim, count, own, seconds)
            if cost < least:
                least, best = cost, plan
    return replace(best, axes=axes[:, : best.dims].copy()) if best.dims else plain


def _cost(
    plan: Plan, needed: Doubles, dim: int, count: int, own: int, seconds: dict[int, float]
) -> float:
    """About how many seconds a row takes, of which `needed` candidates are to be scored again."""
    whole = seconds[dim] + _SCAN
    pairs, cost = count - own / 2, plan.room * _OFFER
    if not plan.dims:
        return cost + pairs * whole + plan.room / 2 * _RESCORE * dim
    width = plan.dims + 1
    in_doubt = float((needed > _SURE * plan.room).mean())
    scored = float(np.minimum(needed, plan.room).mean())
    return (
        cost
        + pairs * (seconds[width] + _SCAN)
        + scored * _RESCORE * dim
        + width * _PROJECT * dim
        + in_doubt * count * whole
    )


def _seconds_of_pair(rows: Floats, width: int, kind: torch.dtype) -> float:
    """Seconds of a product of two rows of this width, in a tile as the search multiplies them."""
    one = torch.from_numpy(rows[:2048, :width]).to(kind).contiguous()
    other = one[: max(1, len(one) // 4)]
    products = torch.empty(len(one), len(other), dtype=kind)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(one, other.T, out=products)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / products.numel()


def _needed(
    rows: Floats,
    half_norms: Doubles,
    axes: Doubles,
    widths: list[int],
    k: int,
    plain: Plan,
    compared: int,
) -> list[Doubles]:
    """For each width, how many candidates the bound leaves of some rows, as an estimate.

    Their k nearest are looked for among all rows, what else the bound leaves among `compared` ones.
    """
    count, random = len(rows), np.random.default_rng(0)
    picked = random.choice(count, min(128, max(32, count // 4096), count), replace=False)
    some = torch.from_numpy(rows[picked]).to(plain.kind)
    turn = torch.from_numpy(axes[:, : widths[-1] - 1]).to(plain.kind)
    nearest = torch.full((len(some), k), -torch.inf)
    for block, norms in _blocks(rows, half_norms, np.arange(count), plain.kind):
        scores = (some @ block.T).float() - norms
        nearest = torch.cat((nearest, scores.topk(min(k, len(block)), 1).values), 1)
        nearest = nearest.topk(k, 1).values
    limit = nearest[:, -1:]
    if plain.half:
        limit = limit - 0.011 * float(half_norms.max())
    counts = torch.zeros(len(widths), len(some), dtype=torch.int64)
    lines = _shortened(some, turn, widths)
    which = np.sort(random.choice(count, compared, replace=False))
    for block, norms in _blocks(rows, half_norms, which, plain.kind):
        short = _shortened(block, turn, widths)
        for number, (line, columns) in enumerate(zip(lines, short, strict=True)):
            counts[number] += ((line @ columns.T).float() - norms > limit).sum(1)
    return [*(counts.numpy() * (count / compared))]


def _blocks(
    rows: Floats, half_norms: Doubles, which: Labels, kind: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(which), _COLUMNS):
        part = which[start : start + _COLUMNS]
        yield torch.from_numpy(rows[part]).to(kind), torch.from_numpy(half_norms[part]).float()


def _shortened(rows: Tensor, turn: Tensor, widths: list[int]) -> list[Tensor]:
    """The rows (n, D) in each width: on the first axes, and behind them what these leave."""
    onto = rows @ turn
    squares = onto.float().square().cumsum(1)
    whole = rows.float().square().sum(1)
    return [
        torch.cat(
            (onto[:, : width - 1], (whole - squares[:, width - 2]).clamp(min=0).sqrt()[:, None]), 1
        ).to(rows.dtype)
        for width in widths
    ]
