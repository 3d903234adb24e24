"""Evaluation during training, and the results of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reid import distributed
from reid.engine.hooks.checkpoints import BEST_MODEL, save_model
from reid.engine.metrics import MetricWriter
from reid.engine.testing import EvaluationError, Scores, evaluate
from reid.engine.trainer import Trainer
from reid.evaluation.evaluation import Details, Evaluation
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.query_gallery import QueryGallery
from reid.evaluation.relevance import Counts
from reid.evaluation.tables import best_evaluation, summary_table
from reid.files import write_text
from reid.pictures.ranked import draw_evaluation
from reid.registry import ConfigError, Hook, nearest, shortened
from reid.structures import DataError

logger = logging.getLogger(__name__)

_NOTHING: Mapping[str, Mapping[str, Any]] = {}
_LARGEST_NUMBER = 1e12  # of an evaluator; shares and counts are smaller


class Evaluate(Hook):
    """Evaluates every `period` epochs and after the last one, and saves the best weights.

    Networks of `Trainer.also_tested` are evaluated too, as `NAME OF THE SET (NETWORK)`; they choose
    no weights. If a test set cannot be evaluated, the error goes to the log and to results.json,
    and training goes on without this set's figures.

    Args:
        test_sets: Each is evaluated separately; the first one chooses the best weights.
        evaluator: Computes the numbers; see the EVALUATOR registry.
        writer: Writes the numbers to metrics.json and TensorBoard.
        output_dir: `model_best`, results.json (see `write_results`) and the pictures go here.
        provenance: Where the results come from; for results.json.
        period: Epochs between evaluations; 0 = only after the last epoch.
        at_start: Evaluate before the first epoch too.
        best_metric: The number that chooses the best weights; larger is better.
        ranked_lists: Queries in the picture of ranked lists, which is drawn after training together
            with a histogram of similarities; 0 = no pictures.
        source_end: The epoch up to which the model is trained on the source alone. It is evaluated
            then: results.json has these numbers as `direct_transfer`. None: there is none.

    Raises:
        ConfigError: The evaluator does not compute `best_metric`.
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
        source_end: int | None = None,
    ) -> None:
        if evaluator.metrics and best_metric not in evaluator.metrics:
            raise ConfigError(
                f"test.best_metric: {best_metric!r} is not among the evaluator's numbers"
                f"{nearest(best_metric, evaluator.metrics)}: {', '.join(evaluator.metrics)}"
            )
        self._test_sets = test_sets
        self._names = [test_set.name for test_set in test_sets]
        self._evaluator = evaluator
        self._writer = writer
        self._output_dir = output_dir
        self._provenance = provenance
        self._period = period
        self._at_start = at_start
        self._best_metric = best_metric
        self._ranked_lists = ranked_lists
        self._source_end = source_end
        self._history: list[dict[str, Any]] = []
        self._failed: list[dict[str, Any]] = []
        self._counts: dict[str, Counts] = {}
        self._details: dict[str, dict[str, Any]] = {}
        self._drawn: Evaluation | None = None

    def before_train(self, trainer: Trainer) -> None:
        """Evaluates the weights that training starts from."""
        if self._at_start and trainer.epoch == 0:
            self._evaluate(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        """Evaluates if the period or the last epoch is over."""
        last = trainer.epoch == trainer.max_epochs
        transfer = trainer.epoch == self._source_end
        if transfer:
            logger.info(
                "Direct transfer: the model of the source, before any adaptation to the target"
            )
        if last or transfer or (self._period and trainer.epoch % self._period == 0):
            self._evaluate(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Logs the table of results, and writes results.json and the pictures."""
        if self._history:
            table = summary_table(
                self._history,
                self._best_metric,
                self._names,
                self._counts,
                self._source_end,
            )
            logger.info("Results\n%s", table)
        if not distributed.is_main():
            return
        write_results(
            self._output_dir,
            self._history,
            self._best_metric,
            self._names,
            self._provenance,
            epoch=trainer.epoch,
            details=self._details,
            failed=self._failed,
            source_end=self._source_end,
        )
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The evaluations so far, without details: only the final evaluation has them."""
        return {"history": self._history, "failed": self._failed}

    def check_state(self, state: Mapping[str, Any], trainer: Trainer, epoch: int) -> None:
        """Checks the evaluations so far.

        Raises:
            ValueError: An entry is no evaluation; the message names it.
        """
        _check(state, "history", epoch, numbers=_is_numbers)
        _check(state, "failed", epoch, error=lambda value: isinstance(value, str))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the evaluations back; an older checkpoint may have none."""
        self._history = list(state.get("history", []))
        self._failed = list(state.get("failed", []))

    def _evaluate(self, trainer: Trainer) -> None:
        for place, test_set in enumerate(self._test_sets):
            for network, model in trainer.also_tested.items():
                name = f"{test_set.name} ({network})"
                try:
                    other = evaluate(model, test_set, self._evaluator, trainer.device)
                except EvaluationError as error:
                    self._note_failure(trainer, name, error)
                else:
                    self._note(trainer, name, other)
            wanted = None
            if trainer.epoch == trainer.max_epochs:
                lists = 0 if place else self._ranked_lists
                wanted = Details(camera_pairs=True, similarities=lists > 0, ranked_lists=lists)
            try:
                scores = evaluate(
                    trainer.inference_model, test_set, self._evaluator, trainer.device, wanted
                )
            except EvaluationError as error:
                self._note_failure(trainer, test_set.name, error)
            else:
                self._note(trainer, test_set.name, scores)
                if wanted is not None and wanted.ranked_lists:
                    self._drawn = scores.evaluation
        best = best_evaluation(self._history, self._best_metric, self._names)
        if best is not None and trainer.epoch and best["epoch"] == trainer.epoch:
            save_model(trainer, self._output_dir / BEST_MODEL)

    def _note(self, trainer: Trainer, name: str, scores: Scores) -> None:
        numbers = scores.numbers
        if self._evaluator.needs_match:  # a protocol of its own counts other queries
            self._counts[name] = scores.counts
        self._details[name] = scores.details
        entry: dict[str, Any] = {"test_set": name, "epoch": trainer.epoch, "numbers": numbers}
        if any(test.is_validation for test in self._test_sets if test.name == name):
            entry["is_validation"] = True
        self._history.append(entry)
        prefixed = {f"{name}/{key}": value for key, value in numbers.items()}
        self._writer.write("test", trainer.step, trainer.epoch, prefixed)
        logger.info(
            "%s after %d epochs: %s",
            name,
            trainer.epoch,
            "  ".join(f"{key} {100 * value:.1f}%" for key, value in numbers.items()),
        )
        if self._best_metric not in numbers:
            logger.error(
                "test.best_metric: %r is not among the evaluator's numbers: %s. %s therefore "
                "chooses no best weights",
                self._best_metric,
                ", ".join(numbers),
                name,
            )

    def _note_failure(self, trainer: Trainer, name: str, error: EvaluationError) -> None:
        self._failed.append({"test_set": name, "epoch": trainer.epoch, "error": str(error)})
        if distributed.is_main():
            # The author of a plug-in needs the traceback of its error.
            cause = error.__cause__
            logger.error(
                "No figures after %d epochs: %s. Training goes on",
                trainer.epoch,
                error,
                exc_info=None if isinstance(cause, DataError | ValueError) else cause,
            )

    def _draw(self, trainer: Trainer) -> None:
        """Draws the last evaluation of the first test set."""
        if self._drawn is None:
            return
        try:
            paths = draw_evaluation(self._drawn, self._names[0], self._output_dir)
        except (DataError, ValueError) as error:
            logger.error("%s: no pictures (%s)", self._names[0], error)
            return
        for path in paths:
            self._writer.write_image(f"pictures/{path.stem}", path, trainer.step)


def _check(state: Mapping[str, Any], name: str, last: int, **checks: Callable[[Any], bool]) -> None:
    """Checks a list of evaluations from a checkpoint; `last` is the checkpoint's epoch.

    Raises:
        ValueError: The list or an entry is not as expected; the message names it.
    """
    checks = {
        "test_set": lambda value: isinstance(value, str),
        "epoch": lambda value: type(value) is int and 0 <= value <= last,
        **checks,
    }
    others = {"is_validation"}
    entries = state.get(name, [])
    if not isinstance(entries, list):
        raise ValueError(f"{name}: expected a list of evaluations, got {shortened(entries)}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() - others != checks.keys():
            raise ValueError(
                f"{name}[{number}]: expected {', '.join(checks)}, got {shortened(entry)}"
            )
        for key, is_right in checks.items():
            if not is_right(entry[key]):
                raise ValueError(f"{name}[{number}].{key}: got {shortened(entry[key])}")
        if type(entry.get("is_validation", False)) is not bool:
            raise ValueError(f"{name}[{number}].is_validation: expected true or false")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and type(number) in (int, float) and abs(number) <= _LARGEST_NUMBER
        for key, number in value.items()
    )


def write_results(
    output_dir: Path,
    history: Sequence[Mapping[str, Any]],
    metric: str,
    test_sets: Sequence[str],
    provenance: Mapping[str, Any],
    *,
    epoch: int,
    details: Mapping[str, Mapping[str, Any]] = _NOTHING,
    failed: Sequence[Mapping[str, Any]] = (),
    source_end: int | None = None,
) -> None:
    """Writes results.json: every evaluation, the best epoch, and where the results come from.

    `final` holds the numbers after the last epoch; report these. `best` holds the numbers of the
    epoch that did best on the first test set. Numbers chosen in this way are too good unless that
    set is a validation split, and `best_chosen_on_test_set` says so. `failed` lists evaluations
    that gave no numbers, with `test_set`, `epoch` and `error`. In a run that begins with a source,
    `direct_transfer` holds the numbers of the source model, from which adaptation starts.

    To keep the file small, only `final` carries details: `counts`, `ap`, `ranked_by`,
    `per_query_AP`, `camera_pairs`, `hardest_queries` and `hardest_query_paths`, which
    `ranking_details` describes. `best` and `history` hold only numbers.

    Args:
        output_dir: results.json is written here.
        history: `test_set`, `epoch` and `numbers` of every evaluation.
        metric: Chooses the best epoch.
        test_sets: Names in the config's order; see `best_evaluation`.
        provenance: See `reid.assembly.provenance`.
        epoch: The last epoch.
        details: Details of each test set's last evaluation, by its name.
        failed: `test_set`, `epoch` and `error` of evaluations that gave no numbers.
        source_end: The last epoch on the source alone; None: there is none.
    """
    best = best_evaluation(history, metric, test_sets)
    last = [entry for entry in history if entry["epoch"] == epoch]
    is_validation = bool(best and best.get("is_validation"))
    chooser = "validation split" if is_validation else "test set"
    transfer = [entry for entry in history if entry["epoch"] == source_end]
    results = {
        **({} if source_end is None else {"direct_transfer": transfer}),
        "final": [{**entry, **details.get(entry["test_set"], {})} for entry in last],
        "best": [entry for entry in history if best and entry["epoch"] == best["epoch"]],
        "best_chosen_by": f"{metric} on the {chooser} {best['test_set']}" if best else "",
        "best_chosen_on_test_set": not is_validation,
        "history": [*history],
        "failed": [*failed],
        "provenance": provenance,
    }
    write_text(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
