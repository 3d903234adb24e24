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

from reid.neighbors.candidates import Candidates, take_first, tile_of
from reid.neighbors.exact import (
    BLOCK_SIZE,
    Compared,
    SearchTask,
    first_plan,
    neighbors_of,
    plans_after,
    prepare,
    search_again,
    slack_of,
)
from reid.neighbors.kernels import Floats, Indices, Offsets
from reid.neighbors.order import rename, reorder
from reid.neighbors.plan import Plan
from reid.neighbors.rescoring import rescore
from reid.neighbors.tiles import Tiles, following, padded_rows
from reid.structures import ProgressBar, part_of_progress

logger = logging.getLogger(__name__)

RECALL = 0.998
"""The share of the neighbours that the visited lists should hold; a sample says how many do."""

_FEWEST_IN_A_LIST = 64
_TRAINED_PER_LIST = 32
_STEPS = 4
_SAMPLE = 512
_ROWS = 2048
_ASSIGNED = 512
_MOST_VISITED = 1 / 3


@dataclass(frozen=True)
class Searched:
    """What is searched, without a projection.

    Attributes:
        task: The search.
        plan: Of the products.
        compared: Lengths, and bounds.
        bound: By how much scores may be too low.
    """

    task: SearchTask
    plan: Plan
    compared: Compared
    bound: float

    def empty(self, rows: int) -> Candidates:
        """Room for the candidates of so many rows."""
        slack = slack_of(self.bound, np.zeros(rows, np.float32), 0.0)
        norms = self.compared.norms
        return Candidates.empty(self.plan.room, len(norms), slack, float(norms.max()), self.task.k)

    def lists(self, which: Indices, found: Candidates) -> Indices:
        """The lists (n, k) of some rows from their candidates.

        Rows that have too few candidates, or lack themselves, are compared with all. Of rows that
        are more alike than products in the plan's type can tell, any may be chosen.
        """
        rows, compared = self.task.rows, self.compared
        lists, _ = rescore(rows, compared.half_norms, which, found, self.bound, compared.unit)
        missed = (found.filled < self.task.k) | (lists[:, 0] != which)
        lists[missed] = true_lists(self.task, self.plan, compared, which[missed])
        return lists


def true_lists(task: SearchTask, plan: Plan, compared: Compared, which: Indices) -> Indices:
    """The exact lists (n, k) of some rows."""
    return search_again(task, [plan, *plans_after(plan, task.k)], compared, which)


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
    def train(cls, tensor: Tensor, count: int, kind: torch.dtype) -> Centres:
        """K-means of some of the rows (N, D), which begins with `count` of them."""
        order = torch.from_numpy(np.random.default_rng(1).permutation(len(tensor)))
        means = tensor[order[:count]].float()
        parts = torch.split(order[: _TRAINED_PER_LIST * count], _ROWS)
        for _ in range(_STEPS):
            centres, sums = cls.of(means, kind), torch.zeros_like(means)
            sizes = torch.zeros(count)
            for part in parts:
                rows = tensor[part]
                nearest = centres.scores(rows).argmax(1)
                sums.index_add_(0, nearest, rows.float())
                sizes += nearest.bincount(minlength=count)
            used = sizes > 0
            means[used] = sums[used] / sizes[used, None]
        return cls.of(means, kind)

    def scores(self, rows: Tensor) -> Tensor:
        """(n, C) x.c - c.c / 2: larger is nearer."""
        return (rows.to(self.rows.dtype) @ self.rows.T).float() - self.norms

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

    def room(self, visits: int) -> int:
        """Most lists that `nearest` gives."""
        return min(visits + visits // 4 + 8, len(self.norms))

    def nearest(self, rows: Tensor, visits: int, largest: float) -> tuple[Indices, Indices]:
        """The lists that rows visit, `visits` or some more, in no order.

        Args:
            rows: (n, D).
            visits: How many at least.
            largest: Half the squared length of the longest row of all.

        Returns:
            The nearest list (n,), and all that are visited (n, `room`), -1: none.
        """
        room, count, norms = self.room(visits), len(rows), self.norms.numpy()
        home, near = np.empty(count, np.int32), np.full((count, room), -1, np.int32)
        for start in range(0, count, _ASSIGNED):
            part = rows[start : start + _ASSIGNED].to(self.rows.dtype)
            slack = np.zeros(len(part), np.float32)
            found = Candidates.empty(room, len(norms), slack, largest, visits)
            places = following(0, len(part))
            take_first(tile_of(part @ self.rows.T), norms, places, 0, *found.arrays)
            taken = np.arange(room) < found.filled[:, None]
            best = np.where(taken, found.scores, -np.inf).argmax(1)
            own, visited = home[start : start + len(part)], near[start : start + len(part)]
            own[:] = found.index[places, best]
            visited[taken] = found.index[taken]
            tied = np.flatnonzero(found.filled < visits)  # no limit parts equally near centres
            if len(tied):
                ranked = self.scores(part[torch.from_numpy(tied)]).topk(visits, 1).indices.numpy()
                own[tied], visited[tied, :visits] = ranked[:, 0], ranked
        return home, near


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
    def of(cls, home: Indices, near: Indices, count: int) -> InvertedFile:
        """Of `count` lists; see `fill`."""
        visitors = np.empty(count_visitors(home, near), np.int32)
        edges, starts = np.empty(count + 1, np.int64), np.empty(count + 1, np.int64)
        lists = cls(np.empty(len(home), np.int32), edges, visitors, starts)
        lists.fill(home, near)
        return lists

    def fill(self, home: Indices, near: Indices) -> None:
        """Fills the arrays.

        Args:
            home: (N,) the list of each row.
            near: (N, room) the lists that it visits, -1: none.
        """
        self.order[:] = np.argsort(home, kind="stable")
        self.edges[:] = self.starts[:] = 0
        self.edges[1:] = np.bincount(home, minlength=len(self.edges) - 1).cumsum()
        _find_starts(home, near, self.starts)
        _fill_visitors(self.order, home, near, self.starts[:-1].copy(), self.visitors)

    def search(
        self,
        tensor: Tensor,
        norms: Floats,
        first: int,
        found: Candidates,
        progress: ProgressBar | None,
    ) -> None:
        """Fills `found`: candidates of the rows from `first` on, in the order of the lists.

        Args:
            tensor: (N, D) all rows in this order.
            norms: (N,).
            first: The first row of `found`.
            found: Without candidates.
            progress: Called with (lists done, twice C).
        """
        tiles = Tiles(tensor, norms, BLOCK_SIZE, found)
        last, edges = first + len(found.filled), list(pairwise(self.edges.tolist()))
        for number, (start, stop) in enumerate(edges):
            own = following(max(start, first), max(min(stop, last) - max(start, first), 0))
            for part in _parts(own, tiles.height):
                rows = padded_rows(tensor, part)
                taken = tiles.first(rows, start, stop, part - first)
                tiles.offer(rows, norms[part], taken, stop, part - first)
            _show(progress, number + 1, 2 * len(edges))
        for number, (start, stop) in enumerate(edges):
            visitors = self.visitors[self.starts[number] : self.starts[number + 1]]
            inside = slice(*np.searchsorted(visitors, (first, last)).tolist())
            for part in _parts(visitors[inside], tiles.height):
                rows = padded_rows(tensor, part)
                tiles.offer(rows, norms[part], start, stop, part - first)
            _show(progress, len(edges) + number + 1, 2 * len(edges))


@dataclass(frozen=True)
class Sample:
    """Some rows and their true lists: of the ones that choose, and of those that are measured."""

    choosing: Indices
    measured: Indices
    lists: Indices

    @classmethod
    def of(cls, task: SearchTask, plan: Plan, compared: Compared) -> Sample:
        """1,024 rows, or all if these are fewer."""
        everyone = following(0, len(task.rows))
        which = np.random.default_rng(0).permutation(everyone)[: 2 * _SAMPLE]
        half = -(-len(which) // 2)
        return cls(which[:half], which[half:], true_lists(task, plan, compared, which))

    def share_found(self, lists: Indices) -> float:
        """The share of the true neighbours of the measured rows that their lists (n, k) have."""
        return share_found(lists, self.lists[len(self.choosing) :])


def visited_lists(tensor: Tensor, kind: torch.dtype, sample: Sample) -> tuple[Centres, int]:
    """The centres, and how many lists rows visit; 0: all rows are to be compared.

    A sample of rows says how many lists hold enough of their neighbours. Where these are a third of
    all, the exact search takes less.

    Args:
        tensor: (N, D) rows in any type.
        kind: The type in which they are multiplied.
        sample: Of them.
    """
    count = len(tensor)
    number = max(1, min(round(2 * count**0.5), count // _FEWEST_IN_A_LIST))
    centres = Centres.train(tensor, number, kind)
    visits = centres.visits(tensor, sample.choosing, sample.lists[: len(sample.choosing)])
    if visits <= _MOST_VISITED * number:
        return centres, visits
    logger.info("Rows would have to visit %s of %s lists of the inverted file, so all are "
                "compared", f"{visits:,}", f"{number:,}")  # fmt: skip
    return centres, 0


def tell(sample: Sample, lists: Indices, visits: int, number: int) -> None:
    """Logs the share of the neighbours of the measured rows that their lists (n, k) have."""
    logger.info("The inverted file found %.3f of the neighbours of %d rows, for which each was "
                "compared with %s of %s lists", sample.share_found(lists), len(lists),
                f"{visits:,}", f"{number:,}")  # fmt: skip


def inverted_neighbors(rows: Floats, k: int, progress: ProgressBar | None) -> Indices:
    """Approximate neighbour lists (N, k) of all rows (N, D), or the exact ones if these take less.

    The share of the neighbours that was found is measured on a sample, for the log.
    """
    task, count = SearchTask(rows, k, BLOCK_SIZE, None, "cpu"), len(rows)
    plan, (scaled, _, compared) = first_plan(task), prepare(rows)
    tensor, sample = torch.from_numpy(scaled), Sample.of(task, plan, compared)
    centres, visits = visited_lists(tensor, plan.kind, sample)
    if not visits:
        return neighbors_of(task, 0, count, progress)
    largest = float(compared.norms.max())
    assigning, searching = (
        part_of_progress(progress, count, *part) for part in ((0, 0.3), (0.3, 1))
    )
    home, near = np.empty(count, np.int32), np.empty((count, centres.room(visits)), np.int32)
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        home[part], near[part] = centres.nearest(tensor[part], visits, largest)
        _show(assigning, min(start + _ROWS, count), count)
    lists = InvertedFile.of(home, near, len(centres.norms))
    del home, near
    in_order, bound, _ = compared.bounded(plan, following(0, 0))
    if not plan.copies:
        in_order = in_order.clone()
    reorder(in_order, lists.order)
    searched = Searched(task, plan, compared, bound)
    found = searched.empty(count)
    lists.search(in_order, compared.norms[lists.order], 0, found, searching)
    del in_order
    rename(found.index, found.filled, lists.order)
    neighbors = np.empty((count, k), np.int32)
    neighbors[lists.order] = searched.lists(lists.order, found)
    tell(sample, neighbors[sample.measured], visits, len(centres.norms))
    return neighbors


def share_found(lists: Indices, true: Indices) -> float:
    """The share of the true neighbours (n, k) that the lists (n, k) have, without the rows."""
    found = 0
    for start in range(0, len(lists), _ROWS):
        part = slice(start, start + _ROWS)
        both = np.sort(np.concatenate((lists[part, 1:], true[part, 1:]), 1), 1)
        found += int((both[:, 1:] == both[:, :-1]).sum())
    return found / true[:, 1:].size if true[:, 1:].size else 1.0


def _parts(places: Indices, most: int) -> Iterator[Indices]:
    for start in range(0, len(places), most):
        yield places[start : start + most]


def _show(progress: ProgressBar | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


@njit(cache=True)
def count_visitors(home: Indices, near: Indices) -> int:
    """How often rows (n,) visit another list than their own; see `InvertedFile.fill`."""
    visitors = 0
    for i in range(len(home)):
        for item in near[i]:
            visitors += item >= 0 and item != home[i]
    return visitors


@njit(cache=True)
def _find_starts(home: Indices, near: Indices, starts: Offsets) -> None:
    """Where the visitors of each list begin, in `starts` (C + 1,), zeros before."""
    for i in range(len(home)):
        for item in near[i]:
            if item >= 0 and item != home[i]:
                starts[item + 1] += 1
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
