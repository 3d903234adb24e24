"""LA-Transformer's published protocol, beside that of Market-1501."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reid.evaluation.distances import comparable_features, distance_blocks
from reid.evaluation.evaluation import Evaluation
from reid.evaluation.evaluators import Market1501Evaluator
from reid.registry import EVALUATOR
from reid.structures import FeatureSet, ProgressBar

_DEPTH = 10
_RANKS = (1, 5, 10)


@EVALUATOR.register()
class LATransformerEvaluator(Market1501Evaluator):
    """The numbers of Market-1501's protocol, and those of LA-Transformer's published evaluation.

    The latter are `LA mAP@10` and `LA Rank-k`. They are far higher, and must not be compared with
    other papers' figures: images of the query's identity from its own camera stay in the gallery,
    junk stays as wrong answers, and only the ten best answers count. Average precision is the mean
    over the hits among these ten of hits so far / rank, 0 without a hit; all queries count.
    The published evaluation also mirrors queries at random, which is left out here. Query expansion
    and re-ranking change Market-1501's numbers alone.

    Args:
        **options: Those of `Market1501Evaluator`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.metrics = (*self.metrics, "LA mAP@10", *(f"LA Rank-{k}" for k in _RANKS))

    def __call__(
        self, evaluation: Evaluation, progress: ProgressBar | None = None
    ) -> dict[str, float]:
        """Both protocols' numbers, as fractions.

        Raises:
            ValueError: A feature is not finite, or a number does not fit the gallery.
        """
        usual = super().__call__(evaluation, progress)
        hits = hits_of_best(evaluation.query, evaluation.gallery)
        precision = average_precision_of_best(hits)
        return {
            **usual,
            "LA mAP@10": float(precision.mean()),
            **{f"LA Rank-{k}": float(hits[:, :k].any(1).mean()) for k in _RANKS},
        }


def hits_of_best(query: FeatureSet, gallery: FeatureSet) -> npt.NDArray[np.bool_]:
    """Whether each of the ten nearest gallery images shows the query's identity.

    Nothing is removed from the gallery; of equally near images the first counts first. Memory: one
    block of distances.

    Returns:
        (Q, 10), the nearest first; fewer columns for a smaller gallery.
    """
    depth = min(_DEPTH, len(gallery))
    pids, gallery_pids = query.pids.cpu().numpy(), gallery.pids.cpu().numpy()
    hits = np.zeros((len(query), depth), bool)
    for start, distances in distance_blocks(*comparable_features(query.test, gallery.test)):
        rows = slice(start, start + len(distances))
        # beyond the gallery's columns is padding
        best = np.argsort(distances[:, : len(gallery)], 1, kind="stable")[:, :depth]
        own = pids[rows, None]
        hits[rows] = (gallery_pids[best] == own) & (own >= 0)
    return hits


def average_precision_of_best(hits: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The average precision (Q,) among the best answers (Q, n): over the hits found there alone."""
    precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    mean: npt.NDArray[np.float64] = (precision * hits).sum(1) / np.maximum(hits.sum(1), 1)
    return mean
