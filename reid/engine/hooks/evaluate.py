"""Evaluation during training, and the results of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reid import distributed
from reid.engine.hooks.checkpoints import BEST_MODEL, save_model
from reid.engine.logs import MetricWriter
from reid.engine.testing import (
    QueryGallery,
    best_evaluation,
    draw_test_pictures,
    evaluate,
    summary_table,
)
from reid.engine.trainer import Trainer
from reid.evaluation.evaluators import Evaluator
from reid.files import write_text
from reid.registry import Hook

logger = logging.getLogger(__name__)


class Evaluate(Hook):
    """Evaluates every `period` epochs and after the last one; keeps the best weights.

    Args:
        test_sets: Each is evaluated on its own; the best weights are chosen by the first.
        evaluator: See the EVALUATOR registry.
        writer: Gets the numbers.
        output_dir: For `model_best`, results.json (see `write_results`) and the pictures.
        provenance: Where the results come from; for results.json.
        period: Epochs; 0 = after the last epoch only.
        at_start: Evaluate before the first epoch too.
        best_metric: The number that tells which weights are best; larger is better.
        ranked_lists: Queries in the picture that is drawn after training, with a histogram of
            similarities; 0 = no pictures.
    """

    def __init__(
        self,
        test_sets: Sequence[QueryGallery],
        evaluator: Evaluator,
        writer: MetricWriter,
        output_dir: Path,
        provenance: Mapping[str, Any],
        *,
        period: int = 0,
        at_start: bool = False,
        best_metric: str = "mAP",
        ranked_lists: int = 0,
    ) -> None:
        self._test_sets = test_sets
        self._evaluator = evaluator
        self._writer = writer
        self._output_dir = output_dir
        self._provenance = provenance
        self._period = period
        self._at_start = at_start
        self._best_metric = best_metric
        self._ranked_lists = ranked_lists
        self._history: list[dict[str, Any]] = []
        self._details: list[dict[str, Any]] = []

    def before_train(self, trainer: Trainer) -> None:
        """Evaluates what training starts from."""
        if self._at_start and trainer.epoch == 0:
            self._evaluate(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        """Evaluates when the period or training ends."""
        last = trainer.epoch == trainer.max_epochs
        if last or (self._period and trainer.epoch % self._period == 0):
            self._evaluate(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Prints the table, writes results.json and the picture."""
        if not self._history:
            return
        logger.info("Results\n%s", summary_table(self._history, self._best_metric))
        if distributed.is_main():
            write_results(
                self._output_dir, self._history, self._details, self._best_metric, self._provenance
            )
        if self._ranked_lists:
            for path in draw_test_pictures(
                trainer.inference_model,
                self._test_sets[0],
                trainer.device,
                self._ranked_lists,
                self._output_dir,
            ):
                self._writer.write_image(f"pictures/{path.stem}", path, trainer.step)

    def state_dict(self) -> dict[str, Any]:
        """The evaluations so far; the last one, which alone has details, comes after any state."""
        return {"history": self._history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the evaluations back."""
        self._history = list(state["history"])

    def _evaluate(self, trainer: Trainer) -> None:
        self._details = []
        for test_set in self._test_sets:
            numbers, details = evaluate(
                trainer.inference_model,
                test_set,
                self._evaluator,
                trainer.device,
                details=trainer.epoch == trainer.max_epochs,
            )
            self._details.append(details)
            if self._best_metric not in numbers:
                raise ValueError(
                    f"test.best_metric: {self._best_metric!r} is not among the evaluator's "
                    f"numbers: {', '.join(numbers)}"
                )
            self._history.append(
                {"test_set": test_set.name, "epoch": trainer.epoch, "numbers": numbers}
            )
            prefixed = {f"{test_set.name}/{name}": value for name, value in numbers.items()}
            self._writer.write("test", trainer.step, trainer.epoch, prefixed)
            logger.info(
                "%s after %d epochs: %s",
                test_set.name,
                trainer.epoch,
                "  ".join(f"{name} {100 * value:.1f}%" for name, value in numbers.items()),
            )
        best = best_evaluation(self._history, self._best_metric)
        if trainer.epoch and best["epoch"] == trainer.epoch:
            save_model(trainer, self._output_dir / BEST_MODEL)


def write_results(
    output_dir: Path,
    history: Sequence[Mapping[str, Any]],
    details: Sequence[Mapping[str, Any]],
    metric: str,
    provenance: Mapping[str, Any],
) -> None:
    """Writes results.json: every evaluation, which epoch was best, where all of it comes from.

    `final` are the numbers after the last epoch, to report without a choice. `best` are those of
    the epoch chosen by a test set, which `best_chosen_on_test_set` says: they flatter.

    To keep the file small, only the last evaluation of each test set, under `final`, carries the
    details: `per_query_AP`, `camera_pairs`, `hardest_queries` and `hardest_query_paths`, as
    `ranking_details` describes them. `best` and `history` hold numbers alone.

    Args:
        output_dir: Where to.
        history: `test_set`, `epoch` and `numbers` of every evaluation, the last one last.
        details: Of the last evaluation, one for each test set in their order; empty: not known.
        metric: Chooses the best epoch.
        provenance: See `reid.assembly.provenance`.
    """
    best = best_evaluation(history, metric)
    final = [entry for entry in history if entry["epoch"] == history[-1]["epoch"]]
    known: Sequence[Mapping[str, Any]] = details or [{}] * len(final)
    results = {
        "final": [{**entry, **more} for entry, more in zip(final, known, strict=True)],
        "best": [entry for entry in history if entry["epoch"] == best["epoch"]],
        "best_chosen_by": f"{metric} on the test set {best['test_set']}",
        "best_chosen_on_test_set": True,
        "history": [*history],
        "provenance": provenance,
    }
    write_text(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
