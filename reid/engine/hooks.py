"""The trainer's own hooks: logging and evaluation; `checkpoints.py` has the other one."""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reid import distributed
from reid.engine.checkpoints import BEST_MODEL, save_model
from reid.engine.logs import MetricWriter
from reid.engine.testing import (
    TestSet,
    best_evaluation,
    draw_test_pictures,
    evaluate,
    summary_table,
)
from reid.engine.trainer import Hook, Trainer
from reid.evaluation.evaluators import Evaluator
from reid.files import write_text
from reid.solver import LR_FACTOR, warmup_factor

logger = logging.getLogger(__name__)


class WarmUp(Hook):
    """Linear warm-up by iterations, on top of the schedule by epochs, as fast-reid has it.

    Iteration i (from 0) has the share `warmup_factor(i, iterations, start)` of the scheduler's
    rate. In the list behind what logs the rate, since it sets that of the next iteration.

    Args:
        iterations: Length of the warm-up.
        start: Where it starts, as a share of the base rate, in every parameter group.
    """

    def __init__(self, iterations: int, start: float) -> None:
        self._iterations = iterations
        self._start = start

    def before_epoch(self, trainer: Trainer) -> None:
        """Sets the rate of the epoch's first iteration."""
        self._set(trainer)

    def after_step(self, trainer: Trainer) -> None:
        """Sets the rate of the next iteration."""
        self._set(trainer)

    def _set(self, trainer: Trainer) -> None:
        if trainer.step > self._iterations:  # in step `iterations` the full rate is set
            return
        groups, rates = trainer.optimizer.param_groups, trainer.scheduler.get_last_lr()
        for group, rate in zip(groups, rates, strict=True):
            start = self._start / group.get(LR_FACTOR, 1.0)
            group["lr"] = rate * warmup_factor(trainer.step, self._iterations, start)


class LogMetrics(Hook):
    """One aligned line every `period` iterations, and the same numbers to the writer.

    Losses and times are means over the iterations since the last line; losses stay on their device
    until then, so that logging does not slow a GPU down.
    """

    def __init__(self, writer: MetricWriter, period: int) -> None:
        self._writer = writer
        self._period = period
        self._sums: dict[str, Tensor] = {}
        self._data_time = 0.0
        self._step_time = 0.0
        self._count = 0
        self._counted = 0
        self._done = 0
        self._timed_steps = 0
        self._timed_seconds = 0.0
        self._bar: tqdm[Any] | None = None

    def before_epoch(self, trainer: Trainer) -> None:
        """Opens the epoch's bar, on a terminal."""
        self._done = 0
        self._bar = tqdm(
            total=len(trainer.loader),
            desc=f"Epoch {trainer.epoch + 1}/{trainer.max_epochs}",
            leave=False,
            disable=None if distributed.is_main() else True,
        )

    def after_step(self, trainer: Trainer) -> None:
        """Adds the batch up, unless it was skipped; logs at the end of a period and of an epoch."""
        if self._bar is not None:
            self._bar.update()
        for name, value in trainer.losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._data_time += trainer.data_time
        self._step_time += trainer.step_time
        self._count += 1
        self._counted += bool(trainer.losses)
        self._done += 1
        if self._done % self._period == 0 or self._done == len(trainer.loader):
            self._log(trainer, self._done)

    def after_epoch(self, trainer: Trainer) -> None:
        """Closes the epoch's bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_break(self, trainer: Trainer) -> None:
        """Closes the epoch's bar."""
        self.after_epoch(trainer)

    def _log(self, trainer: Trainer, done: int) -> None:
        losses = {name: float(value) / self._counted for name, value in self._sums.items()}
        data_time, step_time = self._data_time / self._count, self._step_time / self._count
        self._timed_steps += self._count
        self._timed_seconds += self._step_time
        left = (trainer.max_epochs - trainer.epoch) * len(trainer.loader) - done
        eta = timedelta(seconds=round(left * self._timed_seconds / self._timed_steps))
        numbers = {
            **losses,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "data_time": data_time,
            "step_time": step_time,
            "memory_mb": memory_mb(trainer.device),
        }
        width = len(str(len(trainer.loader)))
        logger.info(
            "epoch %*d/%d  iter %*d/%d  eta %s  %s  lr %.2e  data %.3f s  step %.3f s  mem %s MB",
            len(str(trainer.max_epochs)),
            trainer.epoch + 1,
            trainer.max_epochs,
            width,
            done,
            len(trainer.loader),
            eta,
            "  ".join(f"{name} {value:.4f}" for name, value in losses.items()),
            numbers["lr"],
            data_time,
            step_time,
            f"{numbers['memory_mb']:,.0f}",
        )
        self._writer.write("train", trainer.step, trainer.epoch, numbers)
        self._sums = {}
        self._data_time = self._step_time = 0.0
        self._count = self._counted = 0


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
        test_sets: Sequence[TestSet],
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
                trainer.model,
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
                trainer.model,
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
                {
                    "test_set": test_set.name,
                    "is_validation": test_set.is_validation,
                    "epoch": trainer.epoch,
                    "numbers": numbers,
                }
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
    the epoch chosen by the first test set. They flatter, and `best_chosen_on_test_set` says so,
    unless that one is a validation split.

    To keep the file small, only the last evaluation of each test set, under `final`, carries the
    details: `per_query_AP`, `camera_pairs`, `hardest_queries` and `hardest_query_paths`, as
    `ranking_details` describes them. `best` and `history` hold numbers alone.

    Args:
        output_dir: Where to.
        history: `test_set`, `is_validation`, `epoch` and `numbers` of every evaluation; the last
            one last.
        details: Of the last evaluation, one for each test set in their order; empty: not known.
        metric: Chooses the best epoch.
        provenance: See `reid.engine.provenance`.
    """
    best = best_evaluation(history, metric)
    final = [entry for entry in history if entry["epoch"] == history[-1]["epoch"]]
    known: Sequence[Mapping[str, Any]] = details or [{}] * len(final)
    is_validation = best.get("is_validation", False)  # checkpoints of older versions do not say
    chooser = f"{'validation split' if is_validation else 'test set'} {best['test_set']}"
    results = {
        "final": [{**entry, **more} for entry, more in zip(final, known, strict=True)],
        "best": [entry for entry in history if entry["epoch"] == best["epoch"]],
        "best_chosen_by": f"{metric} on the {chooser}",
        "best_chosen_on_test_set": not is_validation,
        "history": [*history],
        "provenance": provenance,
    }
    write_text(output_dir / "results.json", json.dumps(results, indent=2) + "\n")


def memory_mb(device: torch.device) -> float:
    """Peak memory in MB: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**10 if sys.platform != "darwin" else peak / 2**20
