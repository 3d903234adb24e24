"""Watchers see each block of distances: so one pass serves everything that is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numba
import numpy as np
from torch import Tensor

from reid.evaluation.distances import squared_norms
from reid.evaluation.evaluation import (
    AP,
    CameraPairs,
    PairSimilarities,
    RankingResult,
)
from reid.evaluation.ranking_kernels import (
    Distances,
    FloatArray,
    IntArray,
    count_pairs,
    rank_rows,
)
from reid.evaluation.relevance import Relevance
from reid.neighbors import run_in_pieces
from reid.structures import ProgressBar

_BINS = 2**20
_OPERATIONS = 8  # per distance
_MOST_HISTOGRAMS = 16  # of 16 MB each


class Watcher(Protocol):
    """Sees every block of distances once, and collects numbers from it."""

    def see(self, start: int, distances: Distances) -> None:
        """Looks at a block.

        Args:
            start: Row of the block's first query.
            distances: (b, at least G); columns from G on are padding. The next block may overwrite
                this one.
        """


def show_blocks(
    blocks: Iterable[tuple[int, Distances]],
    watchers: Iterable[Watcher],
    num_queries: int,
    progress: ProgressBar | None,
) -> None:
    """Shows each block to each watcher.

    Args:
        blocks: (start, distances).
        watchers: All see each block.
        num_queries: Number of all queries.
        progress: Called with (queries done, `num_queries`) after each block.
    """
    watchers, done = list(watchers), 0
    for start, distances in blocks:
        for watcher in watchers:
            watcher.see(start, distances)
        done += len(distances)
        if progress is not None:
            progress(done, num_queries)


class QueryRanks:
    """Average precision, inverse negative penalty and rank of the first match of each query.

    The rank of a match is the number of images before it. So only the distances of a query's few
    matches are sorted; one pass over its row of distances then counts how many images lie between
    them. The gallery is never sorted.

    A wrong answer exactly as far as a match counts as nearer. So the figures do not depend on the
    order of the gallery, and features that are all equal get the lowest possible figures.

    Args:
        relevance: Which images are matches and junk.
        ap: The kind of average precision.
        scratch: Reuse the arrays of this watcher, which saw as many queries; only its average
            precision stays valid.

    Attributes:
        average_precision: (Q,), once all blocks were seen; NaN for queries without a match.

    Raises:
        ValueError: `ap` is unknown.
    """

    def __init__(self, relevance: Relevance, ap: AP, scratch: QueryRanks | None = None) -> None:
        if ap not in ("step", "trapezoid"):
            raise ValueError(f"ap: expected step or trapezoid, got {ap!r}")
        count = len(relevance.query_pids)
        self._relevance = relevance
        self._trapezoid = ap == "trapezoid"
        self.average_precision: FloatArray = np.full(count, np.nan)
        self._penalty: FloatArray = scratch._penalty if scratch else np.full(count, np.nan)
        self._first: IntArray = scratch._first if scratch else np.full(count, -1, np.int64)
        self._ties: IntArray = scratch._ties if scratch else np.zeros(count, np.int64)

    def see(self, start: int, distances: Distances) -> None:
        """Ranks the queries of a block."""
        given = self._relevance
        rows = slice(start, start + len(distances))
        run_in_pieces(
            rank_rows,
            len(distances),
            _OPERATIONS * len(given.gallery_pids),
            distances,
            given.query_pids[rows],
            given.query_camids[rows],
            given.gallery_pids,
            given.gallery_camids,
            given.by_pid,
            given.start[rows],
            given.end[rows],
            given.junk,
            given.itself_start[rows.start : rows.stop + 1],
            given.itself,
            self._trapezoid,
            self.average_precision[rows],
            self._penalty[rows],
            self._first[rows],
            self._ties[rows],
        )

    def result(self, max_rank: int, needs_match: bool = True) -> RankingResult:
        """The ranking, once all blocks were seen.

        Args:
            max_rank: Length of the CMC curve.
            needs_match: Whether it is an error if no query has a match; else the CMC is NaN.

        Raises:
            ValueError: No query has a match.
        """
        first = self._first[self._first >= 0]
        if needs_match and not len(first):
            raise ValueError(f"no query has a match: {self._relevance.why_no_match()}")
        found = np.cumsum(np.bincount(first[first < max_rank], minlength=max_rank))
        cmc = found / len(first) if len(first) else np.full(max_rank, np.nan)
        return RankingResult(
            self.average_precision,
            self._penalty,
            self._first,
            self._ties,
            cmc,
        )


class CameraPairRanks:
    """The mAP from camera to camera."""

    MOST_CAMERAS = 256
    """The most cameras of queries, or of the gallery: more would take too long."""

    def __init__(self, relevance: Relevance, ap: AP) -> None:
        self._query_cameras, self._row = np.unique(relevance.query_camids, return_inverse=True)
        self._cameras: IntArray = np.unique(relevance.gallery_camids)
        self._places = [np.flatnonzero(relevance.gallery_camids == c) for c in self._cameras]
        scratch = QueryRanks(relevance, ap)
        self._ranks = [QueryRanks(relevance.within(p), ap, scratch) for p in self._places]

    @classmethod
    def too_many(cls, relevance: Relevance) -> str:
        """Why the table is left out, in words; empty if it is not."""
        counts = [len(np.unique(c)) for c in (relevance.query_camids, relevance.gallery_camids)]
        if max(counts) <= cls.MOST_CAMERAS:
            return ""
        return (
            f"{counts[0]:,} cameras of queries and {counts[1]:,} of the gallery; more than "
            f"{cls.MOST_CAMERAS} make no table"
        )

    def see(self, start: int, distances: Distances) -> None:
        """Ranks each camera's columns of a block."""
        for places, ranks in zip(self._places, self._ranks, strict=True):
            ranks.see(start, np.take(distances, places, axis=1))

    def table(self) -> CameraPairs:
        """The means, once all blocks were seen."""
        table = np.full((len(self._query_cameras), len(self._cameras)), np.nan)
        for row in range(len(self._query_cameras)):
            for column, ranks in enumerate(self._ranks):
                precision = ranks.average_precision[self._row == row]
                counted = precision[~np.isnan(precision)]
                if len(counted):
                    table[row, column] = counted.mean()
        return CameraPairs(self._query_cameras, self._cameras, table)


class PairHistograms:
    """How far apart matching pairs and other pairs are; see `PairSimilarities`."""

    def __init__(self, relevance: Relevance, query_feat: Tensor, gallery_feat: Tensor) -> None:
        self._relevance = relevance
        self._squares = squared_norms(query_feat)
        largest = self._squares.max(initial=0) ** 0.5
        largest += squared_norms(gallery_feat).max(initial=0) ** 0.5
        self._scale = _BINS / max(float(largest) ** 2, 1e-30)
        workers = min(numba.get_num_threads(), _MOST_HISTOGRAMS)
        self._matching = np.zeros((workers, _BINS), np.int64)
        self._others = np.zeros((workers, _BINS), np.int64)

    def see(self, start: int, distances: Distances) -> None:
        """Counts the pairs of a block."""
        given = self._relevance
        rows = slice(start, start + len(distances))
        run_in_pieces(
            count_pairs,
            len(distances),
            _OPERATIONS * len(given.gallery_pids),
            distances,
            self._squares[rows],
            given.query_pids[rows],
            given.query_camids[rows],
            given.gallery_pids,
            given.gallery_camids,
            given.itself_start[rows.start : rows.stop + 1],
            given.itself,
            self._scale,
            self._matching,
            self._others,
        )

    def similarities(self) -> PairSimilarities:
        """The pairs of all queries, once all blocks were seen."""
        return PairSimilarities(self._matching.sum(0), self._others.sum(0), self._scale)


class BestMatches:
    """The k nearest gallery images of some queries; equally near ones in the gallery's order.

    Args:
        relevance: Which images are junk.
        queries: (M,) rows of the queries, rising.
        k: Length of a list.
        keep_junk: Leave junk in the lists.

    Attributes:
        lists: (M, k) gallery indices, best first; -1 where fewer images are left.

    Raises:
        ValueError: k is below 1.
    """

    def __init__(
        self, relevance: Relevance, queries: IntArray, k: int, *, keep_junk: bool = False
    ) -> None:
        if k < 1:
            raise ValueError(f"k: expected 1 or more, got {k}")
        self._relevance = relevance
        self._queries = queries
        self._keep_junk = keep_junk
        self.lists: IntArray = np.full((len(queries), k), -1, dtype=np.int64)

    def see(self, start: int, distances: Distances) -> None:
        """Lists the best images of the queries of a block."""
        k, num_gallery = self.lists.shape[1], len(self._relevance.gallery_pids)
        first, last = np.searchsorted(self._queries, (start, start + len(distances)))
        for place in range(first, last):
            row = int(self._queries[place])
            distance = distances[row - start, :num_gallery]
            kept = np.arange(num_gallery)
            if not self._keep_junk:
                kept = np.flatnonzero(~self._relevance.junk_of(row))
            values = distance[kept]
            if len(kept) > k:
                near = values <= np.partition(values, k - 1)[k - 1]
                kept, values = kept[near], values[near]
            best = kept[np.argsort(values, kind="stable")[:k]]
            self.lists[place, : len(best)] = best
