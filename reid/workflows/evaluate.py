"""Evaluates a trained model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reid import distributed
from reid.assembly.hooks import build_evaluator, teach_evaluator
from reid.assembly.images import build_test_sets, build_train_images
from reid.assembly.network import build_trained_model, known_cameras, place_model
from reid.assembly.plugins import register_parts
from reid.assembly.provenance import provenance
from reid.assembly.specs import check_specs
from reid.assembly.splits import count_splits, log_dataset
from reid.assembly.trained import adopt_training
from reid.config import Config
from reid.engine.testing import EvaluationError, Scores
from reid.engine.testing import evaluate as evaluate_model
from reid.evaluation.evaluation import Details
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.query_gallery import QueryGallery
from reid.evaluation.tables import results_table
from reid.files import write_text
from reid.modeling.model import ReIDModel
from reid.pictures.ranked import draw_evaluation
from reid.registry import ConfigError
from reid.workflows.session import started

logger = logging.getLogger(__name__)


def evaluate(config: Config) -> dict[str, dict[str, float]]:
    """Evaluates `config.model.weights` on the test sets.

    Writes log_eval_only.txt, results_eval_only.json and the pictures of `test.ranked_lists` to
    `config.output_dir`; no training writes files of these names. results_eval_only.json holds
    `weights`, `provenance`, for each test set its `numbers` and the details that `ranking_details`
    describes, and, if test sets could not be evaluated, the reasons in `failed`.

    Returns:
        Numbers by test set.

    Raises:
        ConfigError: A setting is wrong, no weights are set, or there is no test set.
        DataError: The images are not what was expected.
        WeightsError: The weights are broken or do not fit.
        EvaluationError: A test set could not be evaluated; the others' results are written first.
    """
    output_dir = Path(config.output_dir)
    with started(config, "log_eval_only.txt") as (device, _):
        adopt_training(config)
        register_parts(config)
        check_specs(config, training=False)
        train = build_train_images(config) if config.datasets.train else None
        test_sets = build_test_sets(config, train, known_cameras(config, train))
        if not test_sets:
            raise ConfigError("datasets.test: expected a test set to evaluate on, but none is set")
        splits = count_splits("", [], test_sets)
        log_dataset(splits)
        model = build_trained_model(config, (config.input.size[0], config.input.size[1]))
        place_model(model, config, device)
        lists = config.test.ranked_lists
        evaluator = build_evaluator(config)
        teach_evaluator(evaluator, config, train)
        scores, failed = _evaluate_each(model, test_sets, evaluator, device, lists)
        if scores:
            weights = config.model.weights or config.model.backbone_weights
            rows = [(name, weights, each.numbers) for name, each in scores.items()]
            counts = {name: each.counts for name, each in scores.items() if evaluator.needs_match}
            logger.info("Results\n%s", results_table(rows, counts))
        if distributed.is_main() and scores:
            content = {
                "weights": weights,
                **_described(scores, failed),
                "provenance": provenance(config, device, splits),
            }
            text = json.dumps(content, indent=2) + "\n"
            write_text(output_dir / "results_eval_only.json", text)
            first_name = test_sets[0].name
            first = scores.get(first_name)
            if config.test.ranked_lists and first is not None and first.evaluation is not None:
                draw_evaluation(first.evaluation, first_name, output_dir, "_eval_only")
        if failed:
            raise EvaluationError("; ".join(map(str, failed.values())))
    return {name: each.numbers for name, each in scores.items()}


def _evaluate_each(
    model: ReIDModel,
    test_sets: Sequence[QueryGallery],
    evaluator: Evaluator,
    device: torch.device,
    ranked_lists: int,
) -> tuple[dict[str, Scores], dict[str, EvaluationError]]:
    """Scores by test set (ranked lists only for the first), and the errors of failed test sets."""
    scores: dict[str, Scores] = {}
    failed: dict[str, EvaluationError] = {}
    for place, test_set in enumerate(test_sets):
        lists = 0 if place else ranked_lists
        wanted = Details(camera_pairs=True, similarities=lists > 0, ranked_lists=lists)
        try:
            score = evaluate_model(model, test_set, evaluator, device, wanted)
        except EvaluationError as error:
            failed[test_set.name] = error
            if distributed.is_main():
                logger.error("No figures: %s", error)
        else:  # pictures need the features of the first set; those of the others are freed
            scores[test_set.name] = replace(score, evaluation=None) if place else score
    return scores, failed


def _described(
    scores: Mapping[str, Scores], failed: Mapping[str, EvaluationError]
) -> dict[str, dict[str, Any]]:
    """Numbers and details by test set, and the reasons of failed ones under `failed`."""
    sets = {name: {"numbers": each.numbers, **each.details} for name, each in scores.items()}
    why = {name: str(error) for name, error in failed.items()}
    return sets | ({"failed": why} if why else {})
