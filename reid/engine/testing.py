"""Testing a model on a test set: features, one ranking, an evaluator's numbers."""

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
from reid.modeling.domain_batchnorm import Domain, statistics_of
from reid.structures import FeatureSet, part_of_progress


class EvaluationError(RuntimeError):
    """A test set cannot be evaluated; the message says which one and why."""


@dataclass(frozen=True)
class Scores:
    """The result of a model on a test set.

    Attributes:
        numbers: The evaluator's numbers.
        counts: How many queries, junk images and so on the numbers rest on.
        details: The result of `ranking_details`; empty if it was not asked for.
        evaluation: The ranking, for tables and pictures; None except on the main process.
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
    """Tests a model on a test set; extracts features once and ranks once.

    Args:
        model: Gives the features.
        test_set: Query and gallery.
        evaluator: Gives the numbers.
        device: The model's device.
        details: What else to collect; None: nothing, and the result's `details` are empty.

    Returns:
        The scores; numbers, counts and details are the same on every process.

    Raises:
        EvaluationError: The evaluation failed, for any reason and on any process; every process
            raises it.
    """
    try:
        domain: Domain = "source" if test_set.is_source else "target"
        with (
            statistics_of(model, domain),
            progress_bar(f"Extracting {test_set.name}", "img") as progress,
        ):
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
    collected = ranking_details(evaluation) if details is not None else {}
    return Scores(numbers, evaluation.counts, collected), evaluation


def _failed(test_set: QueryGallery, error: Exception) -> EvaluationError:
    return EvaluationError(f"{test_set.name}: {type(error).__name__}: {error}")
