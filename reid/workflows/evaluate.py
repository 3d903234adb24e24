"""Evaluation of a trained model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from reid import distributed
from reid.assembly.hooks import build_evaluator
from reid.assembly.images import build_test_sets, build_train_images
from reid.assembly.network import build_trained_model, known_cameras, place_model
from reid.assembly.plugins import register_parts
from reid.assembly.provenance import provenance
from reid.assembly.specs import check_specs
from reid.assembly.splits import count_splits, log_dataset
from reid.assembly.trained import adopt_training
from reid.config import Config
from reid.engine.testing import draw_test_pictures, results_table
from reid.engine.testing import evaluate as evaluate_model
from reid.files import write_text
from reid.registry import ConfigError
from reid.workflows.session import started

logger = logging.getLogger(__name__)


def evaluate(config: Config) -> dict[str, dict[str, float]]:
    """Evaluates `config.model.weights` on the test sets.

    Leaves results_eval_only.json in `config.output_dir`: `weights`, `provenance`, and by test set
    the `numbers` with the details that `ranking_details` describes.

    Returns:
        Numbers by test set.

    Raises:
        ConfigError: A setting is wrong, no weights are set, or there is no test set.
        DataError: The images are not what was expected.
        WeightsError: The weights are broken or do not fit.
    """
    output_dir = Path(config.output_dir)
    with started(config) as (device, _):
        adopt_training(config)
        register_parts(config)
        check_specs(config, training=False)
        train = build_train_images(config) if config.datasets.train else None
        test_sets = build_test_sets(config, train, known_cameras(config, train))
        if not test_sets:
            raise ConfigError("datasets.test: there is nothing to evaluate on")
        splits = count_splits("", [], test_sets)
        log_dataset(splits)
        model = build_trained_model(config, (config.input.size[0], config.input.size[1]))
        place_model(model, config, device)
        evaluator = build_evaluator(config)
        found = {
            test_set.name: evaluate_model(model, test_set, evaluator, device, details=True)
            for test_set in test_sets
        }
        results = {name: numbers for name, (numbers, _) in found.items()}
        rows = [(name, config.model.weights, numbers) for name, numbers in results.items()]
        logger.info("Results\n%s", results_table(rows))
        if distributed.is_main():
            path = output_dir / "results_eval_only.json"
            content = {
                "weights": config.model.weights,
                **{name: {"numbers": n, **details} for name, (n, details) in found.items()},
                "provenance": provenance(config, device, splits),
            }
            write_text(path, json.dumps(content, indent=2) + "\n")
        if config.test.ranked_lists:
            draw_test_pictures(model, test_sets[0], device, config.test.ranked_lists, output_dir)
    return results
