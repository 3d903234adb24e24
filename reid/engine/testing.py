"""A model on a test set: features, one ranking, an evaluator's numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from reid import distributed
from reid.engine.logs import progress_bar
from reid.evaluation.evaluation import Details, Evaluation
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.query_gallery import QueryGallery
from reid.evaluation.relevance import Counts
from reid.evaluation.report import ranking_details
from reid.structures import FeatureSet, part_of_progress


class EvaluationError(RuntimeError):
    """A test set cannot be evaluated; says which and why."""


@dataclass(frozen=True)
class Scores:
    """What comes of a test set.

    Attributes:
        numbers: The evaluator's.
        counts: What stands behind them.
        details: What `ranking_details` gives; empty if not asked for.
        evaluation: What tables and pictures are made of; on the main process alone, else None.
    """

    numbers: dict[str, float]
    counts: Counts
    details: dict[str, Any]
    evaluation: Evaluation | None = field(default=None, compare=False, repr=False)


def evaluate(
    model: nn.Module,
    test_set: QueryGallery,
    evaluator: Evaluator,
    device: torch.device,
    details: Details | None = None,
) -> Scores:
    """A model on a test set: features are extracted once and ranked once.

    Args:
        model: Gives the features.
        test_set: Query and gallery.
        evaluator: Gives the numbers.
        device: Where the model is.
        details: What else is to be collected; None: nothing, and the result has no `details`.

    Returns:
        Numbers, counts and details are the same on every process.

    Raises:
        EvaluationError: On every process, whatever the cause and wherever it came up.
    """
    try:
        with progress_bar(f"Extracting {test_set.name}", "img") as progress:
            query, gallery = test_set.features(model, device, progress)
    except Exception as error:
        raise _failed(test_set, error) from error
    evaluation: list[Evaluation] = []

    def work() -> Scores:
        try:
            result, ranked = _score(test_set, query, gallery, evaluator, details)
        except Exception as error:
            raise _failed(test_set, error) from error
        evaluation.append(ranked)
        return result

    result = distributed.run_on_main(work)
    if evaluation:
        return Scores(result.numbers, result.counts, result.details, evaluation[0])
    return result


def _score(
    test_set: QueryGallery,
    query: FeatureSet,
    gallery: FeatureSet,
    evaluator: Evaluator,
    details: Details | None,
) -> tuple[Scores, Evaluation]:
    with (
        progress_bar(f"Ranking {test_set.name}", "query") as progress,
        distributed.torch_threads_kept(),
    ):
        ranking, scoring = (
            part_of_progress(progress, len(query), *part) for part in ((0, 0.5), (0.5, 1))
        )
        evaluation = test_set.rank(
            query,
            gallery,
            ap=evaluator.ap,
            details=details or Details(),
            needs_match=evaluator.needs_match,
            progress=ranking,
        )
        evaluation = evaluator.rank_again(evaluation, scoring)
        numbers = {name: float(value) for name, value in evaluator(evaluation).items()}
    broken = [name for name, value in numbers.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"{type(evaluator).__name__} gave no finite {', '.join(broken)}")
    told = ranking_details(evaluation) if details is not None else {}
    return Scores(numbers, evaluation.counts, told), evaluation


def _failed(test_set: QueryGallery, error: Exception) -> EvaluationError:
    return EvaluationError(f"{test_set.name}: {type(error).__name__}: {error}")
