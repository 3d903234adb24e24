"""Ranks a gallery for each query; one pass over the distances serves everything asked for.

Which images are matches and junk: `reid.evaluation.relevance`. How a ranking is counted:
`QueryRanks`. What else can be collected in the same pass: `Details`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from reid.evaluation.distances import checked_blocks, comparable_features, distance_blocks
from reid.evaluation.evaluation import (
    AP,
    EUCLIDEAN,
    Details,
    Evaluation,
    PairSimilarities,
    RankedLists,
    RankingResult,
)
from reid.evaluation.ranking_kernels import IntArray
from reid.evaluation.relevance import Relevance, Verdict
from reid.evaluation.watchers import (
    BestMatches,
    CameraPairRanks,
    PairHistograms,
    QueryRanks,
    Watcher,
    show_blocks,
)
from reid.structures import FeatureSet, ProgressBar

logger = logging.getLogger(__name__)

_TIED_SHARE = 0.01
_NOTHING = Details()


def rank(
    query: FeatureSet,
    gallery: FeatureSet,
    *,
    max_rank: int = 50,
    ap: AP = "step",
    details: Details = _NOTHING,
    query_paths: Sequence[str] | None = None,
    gallery_paths: Sequence[str] | None = None,
    needs_match: bool = True,
    progress: ProgressBar | None = None,
) -> Evaluation:
    """Ranks the gallery for each query by squared Euclidean distance, in float32.

    For unit vectors this is the order of the cosine similarity.

    Args:
        query: Q images, compared by their `test` features.
        gallery: G images.
        max_rank: Length of the CMC curve.
        ap: The kind of average precision; see `AP`.
        details: What else to collect.
        query_paths: Q paths of the images, if they are known. With both lists, an image is never
            its own match; see `Relevance.of`.
        gallery_paths: G paths.
        needs_match: Whether it is an error if no query has a match; see `Evaluator`.
        progress: Called with the number of queries done and of all queries, after each block.

    Raises:
        ValueError: An argument has a wrong shape or length or range, features are not finite, or
            no query has a match and `needs_match`.
    """
    relevance = Relevance.of(query, gallery, query_paths, gallery_paths)
    features = comparable_features(query.test, gallery.test)
    similarities = PairHistograms(relevance, *features) if details.similarities else None
    collected = _Collected(relevance, ap, details, max_rank)
    watchers = [*collected.watchers, *([similarities] if similarities else [])]
    show_blocks(distance_blocks(*features), watchers, len(query), progress)
    evaluation = Evaluation(
        query, gallery, relevance, collected.ranking(needs_match), ap, EUCLIDEAN, details,
        similarities=similarities.similarities() if similarities else None,
        query_paths=query_paths, gallery_paths=gallery_paths,
    )  # fmt: skip
    return collected.added_to(evaluation)


def rank_again(
    evaluation: Evaluation,
    blocks: Iterable[tuple[int, npt.NDArray[np.floating]]],
    *,
    ap: AP,
    ranked_by: str,
    max_rank: int = 50,
) -> Evaluation:
    """The same query and gallery, ranked by other distances, with the same details.

    Args:
        evaluation: As `rank` gives it.
        blocks: (start, distances (b, G)): the distances of the queries from `start` on. Together
            the blocks hold each query once, in any order.
        ap: Which average precision; see `AP`.
        ranked_by: The kind of distance, in words.
        max_rank: Length of the CMC curve.

    Raises:
        ValueError: The blocks have a wrong shape or are not finite, or queries are missing.
    """
    relevance = evaluation.relevance
    sizes = len(evaluation.query), len(evaluation.gallery)
    collected = _Collected(relevance, ap, evaluation.details, max_rank)
    show_blocks(checked_blocks(blocks, *sizes), collected.watchers, sizes[0], None)
    ranking = collected.ranking(needs_match=evaluation.ranking.num_valid > 0)
    again = replace(evaluation, ranking=ranking, ap=ap, ranked_by=ranked_by)
    return collected.added_to(again)


def rank_distances(
    blocks: Iterable[tuple[int, npt.NDArray[np.floating]]],
    query: FeatureSet,
    gallery: FeatureSet,
    *,
    max_rank: int = 50,
    ap: AP = "step",
) -> RankingResult:
    """Ranks the gallery for each query by given distances; features are not used.

    Args:
        blocks: As in `rank_again`.
        query: Q images.
        gallery: G images.
        max_rank: Length of the CMC curve.
        ap: Which average precision; see `AP`.

    Raises:
        ValueError: The blocks have a wrong shape or are not finite, queries are missing, or no
            query has a match.
    """
    collected = _Collected(Relevance.of(query, gallery), ap, _NOTHING, max_rank)
    checked = checked_blocks(blocks, len(query), len(gallery))
    show_blocks(checked, collected.watchers, len(query), None)
    return collected.ranking()


def pair_similarities(
    query: FeatureSet,
    gallery: FeatureSet,
    query_paths: Sequence[str] | None = None,
    gallery_paths: Sequence[str] | None = None,
    progress: ProgressBar | None = None,
) -> PairSimilarities:
    """How far apart matching pairs and other pairs are, without a ranking.

    Args:
        query: Q images.
        gallery: G images.
        query_paths: As in `rank`.
        gallery_paths: As in `rank`.
        progress: As in `rank`.

    Raises:
        ValueError: Features have a wrong shape or are not finite.
    """
    features = comparable_features(query.test, gallery.test)
    relevance = Relevance.of(query, gallery, query_paths, gallery_paths)
    watcher = PairHistograms(relevance, *features)
    show_blocks(distance_blocks(*features), [watcher], len(query), progress)
    return watcher.similarities()


def top_matches(
    query: FeatureSet,
    gallery: FeatureSet,
    *,
    k: int = 10,
    query_paths: Sequence[str] | None = None,
    gallery_paths: Sequence[str] | None = None,
) -> IntArray:
    """The k best gallery images of each query, without junk.

    Returns:
        (Q, k) gallery indices, best first; -1 where fewer images are left.

    Raises:
        ValueError: An argument has a wrong shape or length or range, or features are not finite.
    """
    relevance = Relevance.of(query, gallery, query_paths, gallery_paths)
    features = comparable_features(query.test, gallery.test)
    best = BestMatches(relevance, np.arange(len(query)), k)
    show_blocks(distance_blocks(*features), [best], len(query), None)
    return best.lists


def list_matches(
    query: FeatureSet,
    gallery: FeatureSet,
    count: int,
    *,
    k: int = 10,
    query_paths: Sequence[str] | None = None,
    gallery_paths: Sequence[str] | None = None,
) -> RankedLists:
    """The best gallery images of some queries; computes distances for these queries only.

    Args:
        query: Q images.
        gallery: G images.
        count: Number of queries, spread evenly over all.
        k: Gallery images in a list.
        query_paths: As in `rank`.
        gallery_paths: As in `rank`.

    Raises:
        ValueError: A number is below 1, or features have a wrong shape or are not finite.
    """
    if count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    chosen = spread(len(query), count)
    asked = query[torch.from_numpy(chosen).to(query.test.device)]
    paths = [query_paths[row] for row in chosen] if query_paths is not None else None
    relevance = Relevance.of(asked, gallery, paths, gallery_paths)
    features = comparable_features(asked.test, gallery.test)
    lists = _Lists(relevance, np.arange(len(chosen)), k)
    show_blocks(distance_blocks(*features), lists.watchers, len(chosen), None)
    return replace(lists.result(), queries=chosen.tolist())


def spread(total: int, count: int) -> IntArray:
    """Up to `count` of the numbers 0..total-1, spread evenly, in rising order."""
    if not total or count < 1:
        return np.empty(0, np.int64)
    return np.unique(np.linspace(0, total - 1, count).astype(np.int64))


class _Collected:
    """The watchers that collect an `Evaluation` in one pass over any distances.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, relevance: Relevance, ap: AP, details: Details, max_rank: int) -> None:
        if max_rank < 1:
            raise ValueError(f"max_rank: expected 1 or more, got {max_rank}")
        self._relevance = relevance
        self._max_rank = max_rank
        self._ranks = QueryRanks(relevance, ap)
        self._pairs: CameraPairRanks | None = None
        self._lists: _Lists | None = None
        self.watchers: list[Watcher] = [self._ranks]
        if details.camera_pairs and (why := CameraPairRanks.too_many(relevance)):
            logger.warning("There is no table of camera pairs: %s", why)
        elif details.camera_pairs:
            self._pairs = CameraPairRanks(relevance, ap)
            self.watchers.append(self._pairs)
        if details.ranked_lists:
            rows = spread(len(relevance.query_pids), details.ranked_lists)
            self._lists = _Lists(relevance, rows, details.list_length)
            self.watchers += self._lists.watchers

    def ranking(self, needs_match: bool = True) -> RankingResult:
        """The ranking; warns of ties.

        Raises:
            ValueError: No query has a match and `needs_match`.
        """
        result, given = self._ranks.result(self._max_rank, needs_match), self._relevance
        wrong = len(given.gallery_pids) - len(given.junk) - (given.end - given.start)
        tied = int((result.ties > _TIED_SHARE * wrong).sum())
        if tied:
            logger.warning(
                "%s of %s queries are exactly as far from one of their matches as from more than "
                "one in a hundred wrong answers. A wrong answer that ties counts as the nearer "
                "one. Are the features of many images the same?",
                f"{tied:,}",
                f"{result.num_valid:,}",
            )
        return result

    def added_to(self, evaluation: Evaluation) -> Evaluation:
        """The evaluation with the collected details."""
        return replace(
            evaluation,
            camera_pairs=self._pairs.table() if self._pairs else None,
            ranked_lists=self._lists.result() if self._lists else None,
        )


class _Lists:
    """The best matches of some queries, with and without junk."""

    def __init__(self, relevance: Relevance, rows: IntArray, k: int) -> None:
        self._relevance = relevance
        self._rows = rows
        self.watchers = [
            BestMatches(relevance, rows, k, keep_junk=keep_junk) for keep_junk in (False, True)
        ]

    def result(self) -> RankedLists:
        kept, everything = (
            [
                self._judged(row, columns[columns >= 0])
                for row, columns in zip(self._rows.tolist(), watcher.lists, strict=True)
            ]
            for watcher in self.watchers
        )
        return RankedLists(self._rows.tolist(), kept, everything)

    def _judged(self, row: int, columns: IntArray) -> list[tuple[int, Verdict]]:
        verdicts = self._relevance.verdicts(row, columns)
        return list(zip(columns.tolist(), verdicts, strict=True))
