"""Evaluators: an evaluation becomes a dict of numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from reid.evaluation.evaluation import AP, EUCLIDEAN, Evaluation
from reid.evaluation.ranking import rank, rank_again
from reid.evaluation.reranking import expand_queries, rerank
from reid.registry import EVALUATOR
from reid.structures import FeatureSet, ImageRecord, ProgressBar


class Evaluator(ABC):
    """Base of what is registered in EVALUATOR.

    Attributes:
        ap: The kind of average precision that `rank` is to compute.
        metrics: Names of the numbers, in the order of a table's columns; empty: not known before
            the first evaluation.
        needs_match: Whether it scores queries that have a match under Market-1501's rules alone, so
            that a test set without any is left out before training. False for a protocol of its
            own: such a set is scored too, and its `ranking` has NaN and -1 for each query.
        needs_raw: Whether it needs `FeatureSet.raw` of all banks.
        needs_training: Whether `learn` must be called before the first evaluation.
    """

    ap: AP = "step"
    metrics: tuple[str, ...] = ()
    needs_match: bool = True
    needs_raw: bool = False
    needs_training: bool = False

    def learn(self, records: Sequence[ImageRecord]) -> None:  # noqa: B027 (most need nothing)
        """Takes what the evaluator needs to know of the training images.

        Args:
            records: The images of one training set, whose cameras are those of the test set.

        Raises:
            DataError: The images lack what it needs.
        """

    def rank_again(self, evaluation: Evaluation, progress: ProgressBar | None = None) -> Evaluation:
        """The evaluation, ranked by the evaluator's own distances; the base class changes nothing.

        Tables and lists of matches are made of the result, so they fit the numbers.
        """
        return evaluation

    @abstractmethod
    def __call__(
        self, evaluation: Evaluation, progress: ProgressBar | None = None
    ) -> dict[str, float]:
        """Numbers by name, fractions from 0 to 1, in the order of a table's columns.

        Args:
            evaluation: From `rank` with this evaluator's `ap`, or from `rank_again`.
            progress: Called with (queries' worth of work done, queries).
        """


@EVALUATOR.register()
class Market1501Evaluator(Evaluator):
    """The protocol of Market-1501 (Zheng et al., ICCV 2015), used for all common test sets.

    For each query, gallery images of the same identity *and* the same camera are removed, and so
    is junk (pid -1); distractors stay as wrong answers. Queries without a remaining match
    are ignored. mINP is from Ye et al., *Deep Learning for Person Re-identification* (TPAMI 2021).

    Args:
        ranks: The k of Rank-k.
        ap: `step`, as the field computes it; `trapezoid`, as the original Market-1501 code does,
            which gives slightly lower numbers. See `reid.evaluation.evaluation.AP`.
        query_expansion: How many gallery images each query is averaged with first; 0 = none.
        alpha: Exponent of their weights; 0 = average query expansion, see `expand_queries`.
        reranking: k-reciprocal re-ranking (Zhong et al., CVPR 2017) before the ranking.
        k1: Length of the neighbour lists of re-ranking.
        k2: Length of the lists of its local query expansion.
        original_weight: Weight of the original distance in the re-ranked one (lambda).
        normalize: Compare test features, which have length 1. False: compare the features before
            the necks as they are, all banks joined, as ABD-Net does.

    Raises:
        ValueError: A number is out of its range, or options do not fit each other.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (1, 5, 10, 20),
        ap: AP = "step",
        query_expansion: int = 0,
        alpha: float = 0.0,
        reranking: bool = False,
        k1: int = 20,
        k2: int = 6,
        original_weight: float = 0.3,
        normalize: bool = True,
    ) -> None:
        if not ranks or min(ranks) < 1:
            raise ValueError(f"ranks: expected one or more numbers from 1, got {list(ranks)}")
        self._ranks = tuple(ranks)
        self.ap = ap
        self.metrics = ("mAP", "mINP", *(f"Rank-{k}" for k in self._ranks))
        if query_expansion < 0 or not 0 <= alpha < math.inf:
            raise ValueError(
                f"expected query_expansion and alpha of 0 or more, got {query_expansion}, {alpha}"
            )
        if k1 < 1 or k2 < 1 or not 0 <= original_weight <= 1:
            raise ValueError(
                "expected k1 and k2 of 1 or more and original_weight from 0 to 1, got "
                f"{k1}, {k2}, {original_weight}"
            )
        if not normalize and (query_expansion or reranking):
            raise ValueError(
                "normalize: expected true with query_expansion and reranking, which need features "
                "of length 1; got false"
            )
        self.needs_raw = not normalize
        self._query_expansion = query_expansion
        self._alpha = alpha
        self._reranking = reranking
        self._k1 = k1
        self._k2 = k2
        self._original_weight = original_weight

    @property
    def ranked_by(self) -> str:
        """The kind of distance, in words."""
        steps = []
        if self._query_expansion:
            steps.append(f"query expansion ({self._query_expansion} images, alpha {self._alpha:g})")
        if self._reranking:
            steps.append(
                f"k-reciprocal re-ranking (k1 {self._k1}, k2 {self._k2}, "
                f"original weight {self._original_weight:g})"
            )
        if self.needs_raw:
            return f"{EUCLIDEAN} of the features before normalisation"
        return " and ".join(steps) or EUCLIDEAN

    def rank_again(self, evaluation: Evaluation, progress: ProgressBar | None = None) -> Evaluation:
        """The evaluation, ranked with this evaluator's average precision and distances.

        An evaluation that has them already is returned unchanged.

        Raises:
            ValueError: A feature is not finite, or a number does not fit the gallery.
        """
        if (evaluation.ap, evaluation.ranked_by) == (self.ap, self.ranked_by):
            return evaluation
        query, gallery = evaluation.query, evaluation.gallery
        if self.needs_raw:
            query, gallery = _raw(query), _raw(gallery)
        if self._query_expansion:
            count = min(self._query_expansion, len(gallery))
            query = replace(
                query, test=expand_queries(query.test, gallery.test, count, self._alpha)
            )
        max_rank = max(self._ranks)
        if self._reranking:
            blocks = rerank(
                query.test,
                gallery.test,
                k1=self._k1,
                k2=self._k2,
                lambda_value=self._original_weight,
                progress=progress,
            )
            return rank_again(
                evaluation, blocks, ap=self.ap, ranked_by=self.ranked_by, max_rank=max_rank
            )
        again = rank(
            query,
            gallery,
            max_rank=max_rank,
            ap=self.ap,
            details=replace(evaluation.details, similarities=False),
            query_paths=evaluation.query_paths,
            gallery_paths=evaluation.gallery_paths,
            progress=progress,
        )
        return replace(
            again,
            query=evaluation.query,
            gallery=evaluation.gallery,
            details=evaluation.details,
            ranked_by=self.ranked_by,
            similarities=evaluation.similarities,
        )

    def __call__(
        self, evaluation: Evaluation, progress: ProgressBar | None = None
    ) -> dict[str, float]:
        """mAP, mINP and Rank-k as fractions, over the queries that have a match.

        Raises:
            ValueError: A feature is not finite, or a number does not fit the gallery.
        """
        ranking = self.rank_again(evaluation, progress).ranking
        return {
            "mAP": ranking.mAP,
            "mINP": ranking.mINP,
            **{f"Rank-{k}": ranking.rank(k) for k in self._ranks},
        }


def _raw(features: FeatureSet) -> FeatureSet:
    """The features with the raw ones as test features.

    Raises:
        ValueError: They were not extracted.
    """
    if features.raw is None:
        raise ValueError(
            "normalize: false compares the features before normalisation, which are not at hand "
            "here; set it to true (TEST.EVALUATOR.NORMALIZE true)"
        )
    return replace(features, test=features.raw)
