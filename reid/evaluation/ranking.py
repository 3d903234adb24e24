"""Ranking of a gallery for each query: mAP, mINP and CMC without sorting the gallery.

The protocol is the one of Market-1501 (Zheng et al., *Scalable Person Re-identification: A
Benchmark*, ICCV 2015): for each query, gallery images of the same identity and the same known
camera are removed, and so is junk (identity -1). Everything else stays, distractors as wrong
answers. A query whose camera is unknown (-1) loses no image to its camera. Queries without a match
left are skipped.

Where a match stands in the ranked list is the number of kept images before it. So the distances
of the few matches of a query are sorted, and one pass over its row of distances counts, by binary
search, how many images lie between them. Equal distances are ordered by gallery index.

Results do not depend on the block size: distances are computed in tiles of one fixed shape,
because the last bits of a matrix product change with its shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import numpy.typing as npt
from torch import Tensor

from reid.evaluation.ranking_inputs import (
    RankingIds,
    checked_blocks,
    distance_blocks,
)
from reid.evaluation.ranking_kernels import (
    JUNK,
    Distances,
    FloatArray,
    IntArray,
    count_pairs,
    rank_rows,
)
from reid.neighbors import run_in_pieces
from reid.structures import ProgressBar

_BINS = 2**20
_OPERATIONS = 8  # that a distance takes


@dataclass(frozen=True)
class RankingResult:
    """What a ranking gives, per query and in total.

    Attributes:
        average_precision: (Q,) from 0 to 1; NaN for queries without a match.
        inverse_negative_penalty: (Q,) number of matches / rank of the hardest match, from 0 to 1
            (Ye et al., *Deep Learning for Person Re-identification*, TPAMI 2021); NaN for queries
            without a match.
        first_match_rank: (Q,) 0-based rank of the first match; -1 for queries without a match.
        cmc: (max_rank,) at k - 1 the fraction of queries with a match among the first k.
    """

    average_precision: FloatArray
    inverse_negative_penalty: FloatArray
    first_match_rank: IntArray
    cmc: FloatArray

    @property
    def mAP(self) -> float:  # noqa: N802 - the name in the literature
        """Mean average precision over the queries that have a match."""
        return float(np.nanmean(self.average_precision))

    @property
    def mINP(self) -> float:  # noqa: N802 - the name in the literature
        """Mean inverse negative penalty over the queries that have a match."""
        return float(np.nanmean(self.inverse_negative_penalty))

    @property
    def num_valid(self) -> int:
        """Number of queries that have a match."""
        return int((self.first_match_rank >= 0).sum())

    def hardest(self, k: int) -> IntArray:
        """The (at most) k queries with the lowest average precision, the lowest first."""
        valid = np.flatnonzero(self.first_match_rank >= 0)
        return valid[np.argsort(self.average_precision[valid], kind="stable")[:k]]

    def rank(self, k: int) -> float:
        """Rank-k: the fraction of queries with a match among the first k.

        A k above the gallery's size means the whole gallery.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k: expected 1 or more, got {k}")
        return int(((self.first_match_rank >= 0) & (self.first_match_rank < k)).sum()) / (
            self.num_valid
        )


def rank(
    query_feat: Tensor,
    gallery_feat: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
    *,
    max_rank: int = 50,
    ap: Literal["step", "trapezoid"] = "step",
    block_size: int = 0,
    progress: ProgressBar | None = None,
) -> RankingResult:
    """Ranks the gallery for each query by squared Euclidean distance, in float32.

    For unit vectors this is the order of the cosine similarity.

    Args:
        query_feat: (Q, D) features.
        gallery_feat: (G, D) features, on the same device.
        query_pids: (Q,) identities; -1 has no match.
        gallery_pids: (G,) identities; -1 is junk.
        query_camids: (Q,) cameras; -1 is unknown.
        gallery_camids: (G,) cameras; -1 is unknown.
        max_rank: Length of the CMC curve.
        ap: `step`: the mean over the hits of the precision at the hit. `trapezoid`: the mean of
            that and the precision one place before (1 before the first place), as in the original
            Market-1501 code.
        block_size: Queries at a time, rounded up to whole tiles of 128; 0: so that the distances
            of a block take about 64 MB. It does not change the result.
        progress: Called with the number of queries done and of all queries, after each block.

    Raises:
        ValueError: An argument has a wrong shape or length or range, or features that are not
            finite, or no query has a match.
    """
    if block_size < 0:
        raise ValueError(f"block_size: expected 0 or more, got {block_size}")
    ids = RankingIds.of(query_pids, gallery_pids, query_camids, gallery_camids)
    ids.check_features(query_feat, gallery_feat)
    blocks = distance_blocks(query_feat, gallery_feat, block_size)
    return _rank_blocks(blocks, ids, max_rank, ap, progress)


def rank_distances(
    blocks: Iterable[tuple[int, npt.NDArray[np.floating]]],
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
    *,
    max_rank: int = 50,
    ap: Literal["step", "trapezoid"] = "step",
) -> RankingResult:
    """Ranks the gallery for each query by given distances.

    Args:
        blocks: (start, distances (b, G)): the distances of the queries from `start` on. Together
            the blocks hold each query once, in any order.
        query_pids: (Q,) identities; -1 has no match.
        gallery_pids: (G,) identities; -1 is junk.
        query_camids: (Q,) cameras; -1 is unknown.
        gallery_camids: (G,) cameras; -1 is unknown.
        max_rank: Length of the CMC curve.
        ap: As in `rank`.

    Raises:
        ValueError: An argument has a wrong shape or length or range, or distances that are not
            finite, or no query has a match.
    """
    ids = RankingIds.of(query_pids, gallery_pids, query_camids, gallery_camids)
    return _rank_blocks(checked_blocks(blocks, ids), ids, max_rank, ap, None)


def camera_pair_map(
    query_feat: Tensor,
    gallery_feat: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
    *,
    ap: Literal["step", "trapezoid"] = "step",
) -> tuple[IntArray, IntArray, FloatArray]:
    """The mAP of the queries of one camera in the gallery images of one camera, for all pairs.

    Args:
        query_feat: (Q, D) features.
        gallery_feat: (G, D) features, on the same device.
        query_pids: (Q,) identities.
        gallery_pids: (G,) identities; -1 is junk.
        query_camids: (Q,) cameras.
        gallery_camids: (G,) cameras.
        ap: As in `rank`.

    Returns:
        The queries' cameras (A,), the gallery's cameras (B,), and the mAP (A, B); NaN where no
        query has a match, as within one camera.

    Raises:
        ValueError: An argument has a wrong shape or length, or features that are not finite.
    """
    ids = RankingIds.of(query_pids, gallery_pids, query_camids, gallery_camids)
    ids.check_features(query_feat, gallery_feat)
    pairs = _CameraPairs(ids, ap)
    for _ in pairs.watch(distance_blocks(query_feat, gallery_feat, 0)):
        pass
    return pairs.table()


def rank_with_camera_pairs(
    query_feat: Tensor,
    gallery_feat: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
    *,
    max_rank: int = 50,
    ap: Literal["step", "trapezoid"] = "step",
    progress: ProgressBar | None = None,
) -> tuple[RankingResult, tuple[IntArray, IntArray, FloatArray]]:
    """What `rank` and `camera_pair_map` give, with the distances computed once for both.

    Args:
        query_feat: (Q, D) features.
        gallery_feat: (G, D) features, on the same device.
        query_pids: (Q,) identities; -1 has no match.
        gallery_pids: (G,) identities; -1 is junk.
        query_camids: (Q,) cameras; -1 is unknown.
        gallery_camids: (G,) cameras; -1 is unknown.
        max_rank: Length of the CMC curve.
        ap: As in `rank`.
        progress: As in `rank`.

    Raises:
        ValueError: As in `rank`.
    """
    ids = RankingIds.of(query_pids, gallery_pids, query_camids, gallery_camids)
    ids.check_features(query_feat, gallery_feat)
    pairs = _CameraPairs(ids, ap)
    blocks = pairs.watch(distance_blocks(query_feat, gallery_feat, 0))
    return _rank_blocks(blocks, ids, max_rank, ap, progress), pairs.table()


def true_positive_rates(
    query_feat: Tensor,
    gallery_feat: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
    *,
    false_positive_rates: Sequence[float] = (1e-4, 1e-3, 1e-2),
    progress: ProgressBar | None = None,
) -> FloatArray:
    """Verification: the share of matching pairs accepted at given shares of other pairs accepted.

    All pairs of a query and a gallery image that the protocol keeps are compared with one
    threshold on the squared Euclidean distance. Distances are counted in 2^20 bins of equal width
    from 0 to the largest possible one (4 for unit vectors, so 4e-6 wide); the threshold is the
    largest bin edge that accepts no more than the given share.

    Args:
        query_feat: (Q, D) features.
        gallery_feat: (G, D) features, on the same device.
        query_pids: (Q,) identities; -1 has no match.
        gallery_pids: (G,) identities; -1 is junk.
        query_camids: (Q,) cameras; -1 is unknown.
        gallery_camids: (G,) cameras; -1 is unknown.
        false_positive_rates: From 0 to 1.
        progress: As in `rank`.

    Returns:
        One rate for each of `false_positive_rates`.

    Raises:
        ValueError: An argument has a wrong shape or length or range, features that are not finite,
            or there is no matching or no other pair.
    """
    if not all(0 <= rate <= 1 for rate in false_positive_rates):
        raise ValueError(f"false_positive_rates: expected 0 to 1, got {list(false_positive_rates)}")
    ids = RankingIds.of(query_pids, gallery_pids, query_camids, gallery_camids)
    ids.check_features(query_feat, gallery_feat)
    squares, gallery_squares = (
        feat.float().square().sum(1).cpu().numpy() for feat in (query_feat, gallery_feat)
    )
    largest = squares.max(initial=0) ** 0.5 + gallery_squares.max(initial=0) ** 0.5
    scale = _BINS / max(float(largest) ** 2, 1e-30)
    workers = numba.get_num_threads()
    matching = np.zeros((workers, _BINS), np.int64)
    others = np.zeros((workers, _BINS), np.int64)
    for start, distances in distance_blocks(query_feat, gallery_feat, 0):
        rows = slice(start, start + len(distances))
        run_in_pieces(
            count_pairs,
            len(distances),
            _OPERATIONS * len(ids.gallery_pids),
            distances,
            squares[rows],
            ids.query_pids[rows],
            ids.query_camids[rows],
            ids.gallery_pids,
            ids.gallery_camids,
            scale,
            matching,
            others,
        )
        if progress is not None:
            progress(rows.stop, len(squares))
    accepted, wrong = np.cumsum(matching.sum(0)), np.cumsum(others.sum(0))
    if not accepted[-1] or not wrong[-1]:
        raise ValueError(
            f"expected matching and other pairs, got {accepted[-1]} and {wrong[-1]}; check "
            "query_pids, gallery_pids, query_camids and gallery_camids"
        )
    bins = [np.searchsorted(wrong, rate * wrong[-1], "right") - 1 for rate in false_positive_rates]
    return np.array([accepted[i] / accepted[-1] if i >= 0 else 0.0 for i in bins])


def top_matches(
    query_feat: Tensor,
    gallery_feat: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor,
    gallery_camids: Tensor,
    *,
    k: int = 10,
    keep_junk: bool = False,
) -> IntArray:
    """The k best gallery images of each query, under the protocol and the order of `rank`.

    Args:
        query_feat: (Q, D).
        gallery_feat: (G, D).
        query_pids: (Q,).
        gallery_pids: (G,).
        query_camids: (Q,).
        gallery_camids: (G,).
        k: Length of a list.
        keep_junk: Leave images in the lists that the protocol removes.

    Returns:
        (Q, k) gallery indices, best first; -1 where fewer images are left.

    Raises:
        ValueError: An argument has a wrong shape or length or range, or features that are not
            finite.
    """
    if k < 1:
        raise ValueError(f"k: expected 1 or more, got {k}")
    ids = RankingIds.of(query_pids, gallery_pids, query_camids, gallery_camids)
    ids.check_features(query_feat, gallery_feat)
    num_gallery = len(ids.gallery_pids)
    result = np.full((len(ids.query_pids), k), -1, dtype=np.int64)
    for start, distances in distance_blocks(query_feat, gallery_feat, 0):
        for row, distance in enumerate(distances[:, :num_gallery], start):
            pid, camid = ids.query_pids[row], ids.query_camids[row]
            removed = ids.gallery_pids == JUNK
            if camid >= 0:
                removed |= (ids.gallery_pids == pid) & (ids.gallery_camids == camid)
            kept = np.flatnonzero(~removed | keep_junk)
            values = distance[kept]
            if len(kept) > k:
                near = values <= np.partition(values, k - 1)[k - 1]
                kept, values = kept[near], values[near]
            best = kept[np.argsort(values, kind="stable")[:k]]
            result[row, : len(best)] = best
    return result


def _rank_blocks(
    blocks: Iterable[tuple[int, Distances]],
    ids: RankingIds,
    max_rank: int,
    ap: Literal["step", "trapezoid"],
    progress: ProgressBar | None,
) -> RankingResult:
    if max_rank < 1:
        raise ValueError(f"max_rank: expected 1 or more, got {max_rank}")
    average_precision, inverse_negative_penalty, first_match_rank = _rank_queries(
        blocks, ids, ap, progress
    )
    first = first_match_rank[first_match_rank >= 0]
    if not len(first):
        raise ValueError(
            f"no query has a match: of {len(ids.query_pids)} queries and {len(ids.gallery_pids)} "
            "gallery images, no pair shares an identity across cameras; check query_pids, "
            "gallery_pids, query_camids and gallery_camids"
        )
    cmc = np.cumsum(np.bincount(first[first < max_rank], minlength=max_rank)) / len(first)
    return RankingResult(average_precision, inverse_negative_penalty, first_match_rank, cmc)


class _CameraPairs:
    """The mAP from camera to camera, from the blocks of distances to the whole gallery."""

    def __init__(self, ids: RankingIds, ap: Literal["step", "trapezoid"]) -> None:
        self._ap: Literal["step", "trapezoid"] = ap
        self._query_camids = ids.query_camids
        self._cameras: IntArray = np.unique(ids.gallery_camids)
        self._places = [np.flatnonzero(ids.gallery_camids == camid) for camid in self._cameras]
        self._ids = [
            RankingIds.of_arrays(
                ids.query_pids,
                ids.gallery_pids[places],
                ids.query_camids,
                ids.gallery_camids[places],
            )
            for places in self._places
        ]
        self._precision = np.full((len(self._cameras), len(ids.query_pids)), np.nan)

    def watch(self, blocks: Iterable[tuple[int, Distances]]) -> Iterator[tuple[int, Distances]]:
        """Hands the blocks (b, at least G) on, and ranks each camera's columns on the way."""
        unused = np.empty(len(self._query_camids)), np.empty(len(self._query_camids), np.int64)
        for start, distances in blocks:
            for ids, places, precision in zip(
                self._ids, self._places, self._precision, strict=True
            ):
                columns = np.take(distances, places, axis=1)
                _rank_block(start, columns, ids, self._ap, precision, *unused)
            yield start, distances

    def table(self) -> tuple[IntArray, IntArray, FloatArray]:
        """What `camera_pair_map` returns, once all blocks have passed."""
        rows: IntArray = np.unique(self._query_camids)
        table = np.full((len(rows), len(self._cameras)), np.nan)
        for row, camid in enumerate(rows):
            for column, precision in enumerate(self._precision[:, self._query_camids == camid]):
                counted = precision[~np.isnan(precision)]
                if len(counted):
                    table[row, column] = counted.mean()
        return rows, self._cameras, table


def _rank_queries(
    blocks: Iterable[tuple[int, Distances]],
    ids: RankingIds,
    ap: Literal["step", "trapezoid"],
    progress: ProgressBar | None,
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Average precision, inverse negative penalty and rank of the first match of each query."""
    num_queries = len(ids.query_pids)
    average_precision = np.full(num_queries, np.nan)
    inverse_negative_penalty = np.full(num_queries, np.nan)
    first_match_rank = np.full(num_queries, -1, dtype=np.int64)
    done = 0
    for start, distances in blocks:
        _rank_block(
            start, distances, ids, ap, average_precision, inverse_negative_penalty, first_match_rank
        )
        done += len(distances)
        if progress is not None:
            progress(done, num_queries)
    return average_precision, inverse_negative_penalty, first_match_rank


def _rank_block(
    start: int,
    distances: Distances,
    ids: RankingIds,
    ap: Literal["step", "trapezoid"],
    average_precision: FloatArray,
    inverse_negative_penalty: FloatArray,
    first_match_rank: IntArray,
) -> None:
    """Fills in the last three, (Q,) each, for the queries of one block."""
    if ap not in ("step", "trapezoid"):
        raise ValueError(f"ap: expected step or trapezoid, got {ap!r}")
    rows = slice(start, start + len(distances))
    run_in_pieces(
        rank_rows,
        len(distances),
        _OPERATIONS * len(ids.gallery_pids),
        distances,
        ids.query_camids[rows],
        ids.gallery_camids,
        ids.by_pid,
        ids.start[rows],
        ids.end[rows],
        ids.junk,
        ap == "trapezoid",
        average_precision[rows],
        inverse_negative_penalty[rows],
        first_match_rank[rows],
    )
