"""Evaluators: features of query and gallery become a dict of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

from reid.evaluation.ranking import rank, rank_distances
from reid.evaluation.reranking import expand_queries, rerank
from reid.registry import EVALUATOR
from reid.structures import FeatureSet, ProgressBar


class Evaluator(Protocol):
    """What is registered in EVALUATOR."""

    def __call__(
        self, query: FeatureSet, gallery: FeatureSet, progress: ProgressBar | None = None
    ) -> dict[str, float]:
        """Numbers by name, fractions from 0 to 1, in the order of a table's columns."""


@EVALUATOR.register()
class Market1501Evaluator:
    """The protocol of Market-1501 (Zheng et al., ICCV 2015), used for all common test sets.

    For each query, gallery images of the same identity *and* the same camera are removed, and so
    is junk (pid -1); distractors stay as wrong answers. Queries that have no match left count
    nowhere. mINP is from Ye et al., *Deep Learning for Person Re-identification* (TPAMI 2021).

    Args:
        ranks: The k of Rank-k.
        ap: `step`, the mean of the precision at each hit, as the field computes it; `trapezoid`,
            as the original Market-1501 code does, which gives slightly lower numbers.
        query_expansion: Gallery images that each query is averaged with first; 0 = none.
        alpha: Exponent of their weights; 0 = average query expansion, see `expand_queries`.
        reranking: k-reciprocal re-ranking (Zhong et al., CVPR 2017) before the ranking.
        k1: Length of the neighbour lists of re-ranking.
        k2: Length of the lists of its local query expansion.
        original_weight: Weight of the original distance in the re-ranked one (lambda).

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (1, 5, 10, 20),
        ap: Literal["step", "trapezoid"] = "step",
        query_expansion: int = 0,
        alpha: float = 0.0,
        reranking: bool = False,
        k1: int = 20,
        k2: int = 6,
        original_weight: float = 0.3,
    ) -> None:
        if not ranks or min(ranks) < 1:
            raise ValueError(f"ranks: expected one or more numbers from 1, got {list(ranks)}")
        self._ranks = tuple(ranks)
        self._ap: Literal["step", "trapezoid"] = ap
        if query_expansion < 0 or not 0 <= alpha < math.inf:
            raise ValueError(
                f"expected query_expansion and alpha of 0 or more, got {query_expansion}, {alpha}"
            )
        self._query_expansion = query_expansion
        self._alpha = alpha
        self._reranking = reranking
        self._k1 = k1
        self._k2 = k2
        self._original_weight = original_weight

    def __call__(
        self, query: FeatureSet, gallery: FeatureSet, progress: ProgressBar | None = None
    ) -> dict[str, float]:
        """mAP, mINP and Rank-k as fractions.

        Raises:
            ValueError: No query has a match in another camera.
        """
        ids = (query.pids, gallery.pids, query.camids, gallery.camids)
        max_rank = max(self._ranks)
        query_feat = query.test
        if self._query_expansion:
            count = min(self._query_expansion, len(gallery))
            query_feat = expand_queries(query_feat, gallery.test, count, self._alpha)
        if self._reranking:
            blocks = rerank(
                query_feat,
                gallery.test,
                k1=self._k1,
                k2=self._k2,
                lambda_value=self._original_weight,
                progress=progress,
            )
            result = rank_distances(blocks, *ids, max_rank=max_rank, ap=self._ap)
        else:
            result = rank(
                query_feat,
                gallery.test,
                *ids,
                max_rank=max_rank,
                ap=self._ap,
                progress=progress,
            )
        return {
            "mAP": result.mAP,
            "mINP": result.mINP,
            **{f"Rank-{k}": result.rank(k) for k in self._ranks},
        }
