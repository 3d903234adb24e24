"""Builds the hooks of a training run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from reid.config import Config
from reid.engine.hooks.checkpoints import SaveCheckpoints
from reid.engine.hooks.draw_clusters import DrawClusters
from reid.engine.hooks.evaluate import Evaluate
from reid.engine.hooks.log_metrics import LogMetrics
from reid.engine.hooks.refresh_labels import RefreshPseudoLabels
from reid.engine.metrics import MetricWriter
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.extract import ImageSet
from reid.evaluation.query_gallery import QueryGallery
from reid.labelling import Labeller
from reid.registry import EVALUATOR, HOOK, Hook, build

logger = logging.getLogger(__name__)


def build_evaluator(config: Config) -> Evaluator:
    """Builds the evaluator of `test.evaluator`.

    Raises:
        ConfigError: The evaluator is unknown or an option is wrong.
    """
    return cast(Evaluator, build(EVALUATOR, config.test.evaluator, "test.evaluator"))


def build_hooks(
    config: Config,
    labels: Sequence[RefreshPseudoLabels],
    labeller: Labeller,
    images: ImageSet,
    test_sets: Sequence[QueryGallery],
    provenance: Mapping[str, Any],
    writer: MetricWriter,
    source_end: int | None = None,
) -> list[Hook]:
    """The hooks of every run, then those of the config, in the order in which they are called.

    Args:
        config: The run's config.
        labels: Give the labels, each in its stages; the last one's clusters are drawn.
        labeller: That of the last one.
        images: The training images.
        test_sets: Those that are evaluated.
        provenance: Where the results come from.
        writer: Receives numbers and pictures.
        source_end: The epoch after which the model first sees the target; None: there is none.

    Raises:
        ConfigError: A hook is unknown or an option is wrong.
    """
    output_dir, records = Path(config.output_dir), images.records
    hooks: list[Hook] = [
        SaveCheckpoints(output_dir, config.checkpoint_period, config.checkpoint_keep, source_end),
        *labels,
        LogMetrics(writer, config.log_period),
    ]
    if test_sets:
        hooks.append(
            Evaluate(
                test_sets,
                build_evaluator(config),
                writer,
                output_dir,
                provenance,
                period=config.test.eval_period,
                at_start=config.test.eval_at_start,
                best_metric=config.test.best_metric,
                ranked_lists=config.test.ranked_lists,
                source_end=source_end,
            )
        )
    else:
        logger.warning("No data set has query and gallery, so nothing will be evaluated")
    if not labeller.fixed and config.test.ranked_lists:
        hooks.append(
            DrawClusters(labels[-1], records, output_dir, writer, config.test.ranked_lists)
        )
    return hooks + [
        build(
            HOOK,
            spec,
            f"hooks[{i}]",
            output_dir=output_dir,
            images=images,
            labeller=labeller,
            writer=writer,
        )
        for i, spec in enumerate(config.hooks)
    ]
