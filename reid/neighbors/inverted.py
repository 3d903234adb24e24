"""An approximate search: an inverted file (Jegou et al. 2011), a list at a time.

Rows lie in lists, each around a centre. A row is compared with the rows of its nearest lists only.
All rows that visit a list are multiplied with it at once, so that products are as fast as those of
the exact search.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor

from reid.instructions import fast_bfloat16
from reid.neighbors.candidates import Candidates, take_first, tile_of
from reid.neighbors.exact import (
    BLOCK_SIZE,
    Compared,
    SearchTask,
    neighbors_of,
    plain_plan,
    plans_after,
    prepare,
    search_again,
)
from reid.neighbors.kernels import Floats, Indices, Offsets
from reid.neighbors.order import rename, reorder
from reid.neighbors.plan import Plan
from reid.neighbors.rescoring import rescore
from reid.neighbors.tiles import Tiles, following, padded_rows, search_some
from reid.structures import ProgressBar, part_of_progress

logger = logging.getLogger(__name__)

RECALL = 0.99
"""The share of the neighbours that the visited lists should hold; a sample says how many do."""

_FEWEST_IN_A_LIST = 64
_TRAINED_PER_LIST = 32
_STEPS = 4
_SAMPLE = 256
_ROWS = 8192
_ASSIGNED = 512
_MOST_VISITED = 1 / 3


@dataclass(frozen=True)
class Searched:
    """What is searched.

    Attributes:
        rows: (N, D) vectors.
        tensor: (N, D) what is multiplied.
        compared: Lengths, and bounds.
        bound: By how much scores may be too low.
        slack: (N,) see `Candidates`.
        plan: Of the products.
        k: Neighbours that are looked for.
    """

    rows: Floats
    tensor: Tensor
    compared: Compared
    bound: float
    slack: Floats
    plan: Plan
    k: int

    @classmethod
    def of(cls, rows: Floats, k: int) -> Searched:
        """The search of all rows."""
        plan, compared = plain_plan(k, fast_bfloat16()), prepare(rows)[2]
        tensor, bound, slack = compared.bounded(plan, following(0, len(rows)))
        return cls(rows, tensor, compared, bound, slack, plan, k)

    @property
    def largest(self) -> float:
        """Half the squared length of the longest row."""
        return float(self.compared.norms.max())

    def empty(self, which: Indices) -> Candidates:
        """Room for the candidates of some rows."""
        slack = self.slack[which]
        return Candidates.empty(self.plan.room, len(self.rows), slack, self.largest, self.k)

    def lists(self, which: Indices, found: Candidates) -> Indices:
        """The k nearest of the candidates of some rows."""
        compared = self.compared
        return rescore(self.rows, compared.half_norms, which, found, self.bound, compared.unit)[0]

    def true_lists(self, which: Indices) -> Indices:
        """The lists of some rows, compared with all."""
        found = self.empty(which)
        search_some(self.tensor, self.compared.norms, which, BLOCK_SIZE, found)
        return self.lists(which, found)


@dataclass(frozen=True)
class Centres:
    """Centres of lists.

    Attributes:
        rows: (C, D), in the type of what is multiplied.
        norms: (C,) half their squared lengths.
    """

    rows: Tensor
    norms: Tensor

    @classmethod
    def of(cls, means: Tensor, kind: torch.dtype) -> Centres:
        """Means (C, D), rounded to the type of what is multiplied."""
        rows = means.to(kind)
        return cls(rows, 0.5 * rows.float().square().sum(1))

    @classmethod
    def train(cls, tensor: Tensor, count: int) -> Centres:
        """K-means of some of the rows (N, D), which begins with `count` of them."""
        order = torch.from_numpy(np.random.default_rng(1).permutation(len(tensor)))
        means = tensor[order[:count]].float()
        parts = torch.split(order[: _TRAINED_PER_LIST * count], _ROWS)
        for _ in range(_STEPS):
            centres, sums = cls.of(means, tensor.dtype), torch.zeros_like(means)
            sizes = torch.zeros(count)
            for part in parts:
                rows = tensor[part]
                nearest = centres.scores(rows).argmax(1)
                sums.index_add_(0, nearest, rows.float())
                sizes += nearest.bincount(minlength=count)
            used = sizes > 0
            means[used] = sums[used] / sizes[used, None]
        return cls.of(means, tensor.dtype)

    def scores(self, rows: Tensor) -> Tensor:
        """(n, C) x.c - c.c / 2: larger is nearer."""
        return (rows @ self.rows.T).float() - self.norms

    def visits(self, tensor: Tensor, which: Indices, lists: Indices) -> int:
        """How many lists rows must visit to find the share `RECALL` of their neighbours.

        Args:
            tensor: (N, D).
            which: (n,) some rows.
            lists: (n, k) themselves and their neighbours.
        """
        near, places = np.unique(lists[:, 1:], return_inverse=True)
        if not len(near):
            return 1
        home = torch.cat([
            self.scores(tensor[part]).argmax(1)
            for part in torch.split(torch.from_numpy(near.astype(np.int64)), _ROWS)
        ])  # fmt: skip
        scores = self.scores(tensor[torch.from_numpy(which.astype(np.int64))])
        needed = scores.gather(1, home[torch.from_numpy(places.reshape(lists[:, 1:].shape))])
        ordered = scores.sort(1).values
        nearer = len(self.norms) - torch.searchsorted(ordered, needed, right=True)
        return int(nearer.flatten().sort().values[math.ceil(RECALL * nearer.numel()) - 1]) + 1


@dataclass(frozen=True)
class InvertedFile:
    """Which rows lie in a list, and which visit it.

    Attributes:
        order: (N,) the rows, list by list.
        edges: (C + 1,) where lists begin in this order.
        visitors: The places of the rows that visit a list from another one, list by list.
        starts: (C + 1,) where those of a list begin.
    """

    order: Indices
    edges: Offsets
    visitors: Indices
    starts: Offsets

    @classmethod
    def of(
        cls, searched: Searched, centres: Centres, visits: int, progress: ProgressBar | None
    ) -> InvertedFile:
        """Each row lies in the list of the nearest centre, and visits as many as are wanted."""
        tensor, count = searched.tensor, len(centres.norms)
        room = min(visits + visits // 4 + 8, count)
        near = np.full((len(tensor), room), -1, np.int32)
        home = np.empty(len(tensor), np.int32)
        norms = centres.norms.numpy()
        for start in range(0, len(tensor), _ASSIGNED):
            part = tensor[start : start + _ASSIGNED]
            places, slack = following(0, len(part)), np.zeros(len(part), np.float32)
            found = Candidates.empty(room, count, slack, searched.largest, visits)
            take_first(tile_of(part @ centres.rows.T), norms, places, 0, *found.arrays)
            taken = np.arange(room) < found.filled[:, None]
            best = np.where(taken, found.scores, -np.inf).argmax(1)
            home[start : start + len(part)] = found.index[np.arange(len(part)), best]
            near[start : start + len(part)][taken] = found.index[taken]
            if progress is not None:
                progress(start + len(part), len(tensor))
        order = np.argsort(home, kind="stable").astype(np.int32)
        edges = np.concatenate(([0], np.bincount(home, minlength=count).cumsum()))
        starts = np.zeros(count + 1, np.int64)
        _count_visitors(home, near, starts)
        visitors = np.empty(starts[-1], np.int32)
        _fill_visitors(order, home, near, starts[:-1].copy(), visitors)
        return cls(order, edges, visitors, starts)

    def search(
        self, tensor: Tensor, norms: Floats, found: Candidates, progress: ProgressBar | None
    ) -> None:
        """Fills `found`: candidates of all rows, which lie in the order of the lists.

        Args:
            tensor: (N, D).
            norms: (N,).
            found: Without candidates.
            progress: Called with (lists done, twice C).
        """
        tiles = Tiles(tensor, norms, BLOCK_SIZE, found)
        edges = list(pairwise(self.edges.tolist()))
        for number, (start, stop) in enumerate(edges):
            for own in _parts(following(start, stop - start), tiles.height):
                rows = padded_rows(tensor, own)
                taken = tiles.first(rows, start, stop, own)
                tiles.offer(rows, norms[own], taken, stop, own)
            _show(progress, number + 1, 2 * len(edges))
        for number, (start, stop) in enumerate(edges):
            visitors = self.visitors[self.starts[number] : self.starts[number + 1]]
            for part in _parts(visitors, tiles.height):
                tiles.offer(padded_rows(tensor, part), norms[part], start, stop, part)
            _show(progress, len(edges) + number + 1, 2 * len(edges))


def inverted_neighbors(rows: Floats, k: int, progress: ProgressBar | None) -> Indices:
    """Approximate neighbour lists (N, k) of all rows (N, D).

    A sample of rows, whose true neighbours are looked for, says how many lists a row must visit.
    Where these are a third of all, the search is exact, since that takes less. The share of the
    neighbours that was found is measured on another sample, for the log.
    """
    searched, count = Searched.of(rows, k), len(rows)
    sample = np.random.default_rng(0).permutation(following(0, count))[: 2 * _SAMPLE]
    choosing, measured = np.array_split(sample, 2)
    number = max(1, min(round(2 * count**0.5), count // _FEWEST_IN_A_LIST))
    centres = Centres.train(searched.tensor, number)
    visits = centres.visits(searched.tensor, choosing, searched.true_lists(choosing))
    task = SearchTask(rows, k, BLOCK_SIZE, None, "cpu")
    if visits > _MOST_VISITED * number:
        logger.info("Rows would have to visit %s of %s lists of the inverted file, so all are "
                    "compared", f"{visits:,}", f"{number:,}")  # fmt: skip
        return neighbors_of(task, 0, count, progress)
    true = searched.true_lists(measured)
    assigning, searching = (
        part_of_progress(progress, count, *part) for part in ((0, 0.3), (0.3, 1))
    )
    lists = InvertedFile.of(searched, centres, visits, assigning)
    tensor = searched.tensor if searched.plan.copies else searched.tensor.clone()
    reorder(tensor, lists.order)
    found = searched.empty(lists.order)
    lists.search(tensor, searched.compared.norms[lists.order], found, searching)
    rename(found.index, found.filled, lists.order)
    neighbors = np.empty((count, k), np.int32)
    neighbors[lists.order] = searched.lists(lists.order, found)
    few = np.sort(lists.order[found.filled < k])
    del found
    plans = [searched.plan, *plans_after(searched.plan, k)]
    search_again(task, plans, searched.compared, few, neighbors, 0)
    logger.info("The inverted file found %.3f of the neighbours of %d rows, for which each was "
                "compared with %s of %s lists", share_found(neighbors[measured], true),
                len(measured), f"{visits:,}", f"{number:,}")  # fmt: skip
    return neighbors


def share_found(lists: Indices, true: Indices) -> float:
    """The share of the true neighbours (n, k) that the lists (n, k) have, without the rows."""
    same = lists[:, 1:, None] == true[:, None, 1:]
    return float(same.any(1).mean()) if same.size else 1.0


def _parts(places: Indices, most: int) -> Iterator[Indices]:
    for start in range(0, len(places), most):
        yield places[start : start + most]


def _show(progress: ProgressBar | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


@njit(cache=True)
def _count_visitors(home: Indices, near: Indices, starts: Offsets) -> None:
    """Where the visitors of each list begin, in `starts` (C + 1,), zeros before."""
    for i in range(len(home)):
        for place in range(near.shape[1]):
            if near[i, place] >= 0 and near[i, place] != home[i]:
                starts[near[i, place] + 1] += 1
    for number in range(1, len(starts)):
        starts[number] += starts[number - 1]


@njit(cache=True)
def _fill_visitors(
    order: Indices, home: Indices, near: Indices, heads: Offsets, visitors: Indices
) -> None:
    """The places in `order` of the visitors of each list, from `heads` (C,) on."""
    for place in range(len(order)):
        i = order[place]
        for item in near[i]:
            if item >= 0 and item != home[i]:
                visitors[heads[item]] = place
                heads[item] += 1
