"""The Jaccard distance of `reid.neighbors.jaccard` in torch, for features on a GPU.

It computes the same definition in blocks of rows, with sorted keys in place of loops. Sums are in
double precision, but the device chooses their order: the last bit of a distance in single precision
may differ from the CPU's, which is less than `TIE_TOLERANCE`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reid.neighbors.sparse import Rows

_ROWS = 1024
_PAIRS = 2**25


@dataclass(frozen=True)
class _Rows:
    """A sparse (N, N) matrix by rows: N + 1 offsets, columns, and values in single precision."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    @property
    def counts(self) -> Tensor:
        return self.offsets.diff()

    def take(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """For all entries of some rows in order: the row's index in `which`, the entry's place."""
        counts = self.counts[which]
        number = torch.repeat_interleave(torch.arange(len(which), device=which.device), counts)
        place = torch.arange(len(number), device=which.device)
        place += (self.offsets[which] - counts.cumsum(0) + counts)[number]
        return number, place


def jaccard_on_device(
    features: Tensor,
    neighbors: Tensor,
    length: int,
    half: int,
    k2: int,
    max_distance: float,
    *,
    pairs: int = _PAIRS,
) -> Rows:
    """Jaccard distances below 1 from lists of neighbours, on the device of both.

    Args:
        features: (N, D).
        neighbors: (N, k) lists, the image itself first.
        length: Entries of the lists that count, at most k.
        half: Entries of the half lists that count.
        k2: Rows averaged; 1 = no expansion.
        max_distance: Larger distances are left out.
        pairs: Pairs of entries in a block; does not change the result.

    Returns:
        (N, N) float32 on the CPU, as `jaccard_rows` gives it.
    """
    neighbors = neighbors.long()
    encoding = _soft_sets(features.float(), neighbors[:, :length], half)
    k2 = min(k2, neighbors.shape[1])
    if k2 > 1:
        encoding = _expand(encoding, neighbors[:, :k2])
    return _distances(encoding, max_distance, pairs)


def _reciprocal(lists: Tensor) -> Tensor:
    """(N, k) bool: whether entry j of the list of i has i in its list."""
    parts = []
    for start in range(0, len(lists), _ROWS):
        part = lists[start : start + _ROWS]
        own = torch.arange(start, start + len(part), device=lists.device)
        parts.append((lists[part] == own[:, None, None]).any(2))
    return torch.cat(parts)


def _soft_sets(features: Tensor, lists: Tensor, half: int) -> _Rows:
    """Softmax of the negative squared distances over the expanded k-reciprocal sets."""
    count = len(lists)
    near = _reciprocal(lists)
    half_near = _reciprocal(lists[:, :half])
    norms = torch.cat(
        [
            features[start : start + _ROWS].double().square().sum(1)
            for start in range(0, count, _ROWS)
        ]
    )
    sizes, columns, values = [], [], []
    for start in range(0, count, _ROWS):
        own, mask = lists[start : start + _ROWS], near[start : start + _ROWS]
        theirs = lists[own, :half]  # (b, k, half)
        their_mask = half_near[own] & mask[:, :, None]
        in_own = ((theirs[..., None] == own[:, None, None]) & mask[:, None, None]).any(3)
        merged = 3 * (in_own & their_mask).sum(2) > 2 * their_mask.sum(2)
        their_mask &= merged[:, :, None]
        members = torch.cat(
            (own.masked_fill(~mask, count), theirs.masked_fill(~their_mask, count).flatten(1)), 1
        )
        members = members.sort(1).values
        kept = members < count
        kept[:, 1:] &= members[:, 1:] != members[:, :-1]
        row, _ = kept.nonzero(as_tuple=True)
        column = members[kept]
        products = torch.empty(len(row), dtype=torch.float64, device=lists.device)
        for first in range(0, len(row), 8 * _ROWS):
            some = slice(first, first + 8 * _ROWS)
            left, right = features[row[some] + start].double(), features[column[some]].double()
            products[some] = (left * right).sum(1)
        weight = torch.exp(-(norms[row + start] + norms[column] - 2 * products).clamp(min=0))
        total = weight.new_zeros(len(own)).index_add_(0, row, weight)
        sizes.append(kept.sum(1))
        columns.append(column)
        values.append((weight / total[row]).float())
    return _Rows(_offsets(torch.cat(sizes)), torch.cat(columns), torch.cat(values))


def _expand(encoding: _Rows, nearest: Tensor) -> _Rows:
    """Local query expansion: each row becomes the mean of its neighbours' rows."""
    count, k2 = nearest.shape
    sizes, columns, values = [], [], []
    for start in range(0, count, _ROWS):
        part = nearest[start : start + _ROWS]
        number, place = encoding.take(part.flatten())
        keys = number // k2 * count + encoding.columns[place]
        keys, sums = _sum_by_key(keys, encoding.values[place])
        sizes.append(torch.bincount(keys // count, minlength=len(part)))
        columns.append(keys % count)
        values.append((sums / k2).float())
    return _Rows(_offsets(torch.cat(sizes)), torch.cat(columns), torch.cat(values))


def _distances(encoding: _Rows, max_distance: float, pairs: int) -> Rows:
    """The distances 1 - m / (2 - m) below 1, where m is the sum of minima of two rows."""
    count = len(encoding.counts)
    device = encoding.columns.device
    row = torch.repeat_interleave(torch.arange(count, device=device), encoding.counts)
    order = torch.argsort(encoding.columns, stable=True)
    by_column = _Rows(
        _offsets(torch.bincount(encoding.columns, minlength=count)),
        row[order],
        encoding.values[order],
    )
    # Blocks of rows with `pairs` pairs of entries in common columns; at least one row.
    work = by_column.counts[encoding.columns]
    cost = _offsets(work)[encoding.offsets].cpu().numpy()
    sizes, columns, values = [], [], []
    start = 0
    while start < count:
        stop = int(np.searchsorted(cost, cost[start] + pairs, side="right")) - 1
        stop = min(max(stop, start + 1), count)
        number, place = encoding.take(torch.arange(start, stop, device=device))
        entry, other = by_column.take(encoding.columns[place])
        smaller = torch.minimum(encoding.values[place][entry], by_column.values[other])
        keys = number[entry] * count + by_column.columns[other]
        keys, sums = _sum_by_key(keys, smaller)
        distance = (1 - sums / (2 - sums)).clamp(min=0).float()
        kept = (sums > 0) & (distance < 1) & (distance <= max_distance)
        keys = keys[kept]
        sizes.append(torch.bincount(keys // count, minlength=stop - start).cpu())
        columns.append((keys % count).int().cpu())
        values.append(distance[kept].cpu())
        start = stop
    offsets = _offsets(torch.cat(sizes))
    kind = torch.int32 if int(offsets[-1]) < 2**31 else torch.int64
    return Rows(
        offsets.to(kind).numpy(),
        torch.cat(columns).to(kind).numpy(),
        torch.cat(values).numpy(),
        (count, count),
    )


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))


def _sum_by_key(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys in order, and the sum of each key's values in double precision."""
    found, which = torch.unique(keys, return_inverse=True)
    sums = torch.zeros(len(found), dtype=torch.float64, device=keys.device)
    return found, sums.index_add_(0, which, values.double())
