#!/usr/bin/env python
"""Shows where the time of an epoch goes: trains any config and times each stage.

On a GPU the program waits at the end of each stage to measure it alone, so the sum is longer than
an unmeasured epoch. The first epoch is for warming up; the others count.

Floor of an epoch: the network's products, convolutions and attentions in its steps, in extraction
and in the evaluation, each run alone. Of the extraction, beside it: the network's forward passes in
it, so `extraction_over_forward` says what loading and all else add.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from floors import Floor, Products, clock, same_threads
from measure import report
from tabulate import tabulate
from torch import nn

from reid.assembly.network import pick_device
from reid.assembly.plugins import register_parts
from reid.assembly.trainer import build_trainer
from reid.config import load_config
from reid.engine.metrics import MetricWriter
from reid.engine.randomness import seed_everything
from reid.engine.stopping import StopSignals
from reid.engine.trainer import Trainer
from reid.registry import Hook
from reid.structures import Batch

DEFAULT = "projects/TMGF/configs/demo.yaml"


class Stopwatch(Hook):
    """Seconds by stage, of every epoch but the first.

    Args:
        device: That the trainer uses.

    Attributes:
        seconds: By stage, of the epochs that count.
        forward: Of it, what the network's forward passes took in extractions.
        taken: All seconds of these epochs, by the clock of `floors`.
        steps: Products of a training step.
        inference: Products of a batch of an extraction or evaluation.
        inferred: Images in that batch, and in all such batches of the epochs that count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = 0.0
        self._counts = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.forward = self.taken = 0.0
        self.steps, self.inference = Products(device.type), Products(device.type)
        self.inferred = [0, 0]
        self._extracts = False
        self._began = self._forward_began = 0.0

    def attach(self, trainer: Trainer) -> None:
        """Before, between and after the parts of a step, and around every hook."""
        for hook in trainer.hooks:
            for name in ("before_epoch", "after_step", "save", "after_epoch"):
                setattr(hook, name, self._timed(getattr(hook, name), type(hook).__name__))
        trainer.hooks.append(self)
        setattr(trainer, "run_step", self._recorded(trainer.run_step, trainer))  # noqa: B010
        trainer.model.register_forward_pre_hook(self._before_inference)
        trainer.model.register_forward_hook(self._after_inference)
        trainer.model.register_forward_pre_hook(self._during_training("loading", trainer))
        trainer.model.register_forward_hook(self._during_training("network forward", trainer))
        trainer.criterion.register_forward_hook(self._during_training("losses", trainer))
        trainer.optimization.optimizer.register_step_pre_hook(lambda *_: self.lap("backward"))
        trainer.optimization.optimizer.register_step_post_hook(lambda *_: self.lap("optimizer"))

    def lap(self, stage: str) -> None:
        """The time since the last lap was for this stage."""
        now = self._now()
        if self._counts:
            self.seconds[stage] += now - self._since
        self._since = now

    def before_epoch(self, trainer: Trainer) -> None:
        """What came between the hooks."""
        self.lap("other")

    def after_epoch(self, trainer: Trainer) -> None:
        """The first epoch is over."""
        self.lap("other")
        now = clock(self._device.type)
        if self._counts:
            self.taken += now - self._began
        self._began = now
        self._counts = True

    def _timed(self, call: Callable[[Trainer], None], name: str) -> Callable[[Trainer], None]:
        def timed(trainer: Trainer) -> None:
            self.lap("other")
            self._extracts = name == "RefreshPseudoLabels"
            call(trainer)
            self._extracts = False
            self.lap(f"hook {name}")

        return timed

    def _recorded(self, run_step: Callable[..., None], trainer: Trainer) -> Callable[..., None]:
        """`run_step`, which records its products in the second step of the run."""

        def run(*arguments: Any) -> None:
            with self.steps if trainer.step == 1 else nullcontext():
                run_step(*arguments)

        return run

    def _before_inference(self, model: nn.Module, inputs: tuple[Batch]) -> None:
        if model.training:
            return
        if not self.inferred[0]:
            self.inference.__enter__()
        self._forward_began = self._now()

    def _after_inference(self, model: nn.Module, inputs: tuple[Batch], _: Any) -> None:
        if model.training:
            return
        if self._counts and self._extracts:
            self.forward += self._now() - self._forward_began
        count = len(inputs[0].image)
        if not self.inferred[0]:
            self.inference.__exit__(None, None, None)
            self.inferred[0] = count
        self.inferred[1] += count if self._counts else 0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _during_training(self, stage: str, trainer: Trainer) -> Callable[..., None]:
        def lap(*_: Any) -> None:
            if trainer.model.training:
                self.lap(stage)

        return lap


class Recorder(MetricWriter):
    """Stores the run's numbers about pseudo-labels, and writes nothing."""

    def __init__(self, watch: Stopwatch, folder: Path) -> None:
        super().__init__(folder)
        self._watch = watch

    def write(self, kind: str, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """Stores the times of extraction and clustering, which are part of their hook's time."""
        if kind == "labels" and epoch:
            self._watch.seconds["extraction"] += numbers["extraction_time"]
            self._watch.seconds["clustering"] += numbers["label_time"]


def main() -> None:
    """Parses the arguments, trains, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", action="append", help=f"(default: {DEFAULT})")
    parser.add_argument("--epochs", type=int, default=3, help="one warms up (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="as in train_net.py")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs: expected 2 or more, the first warms up")
    files = [Path(file) for file in arguments.config_file or [DEFAULT]]
    with tempfile.TemporaryDirectory() as folder, StopSignals() as signals:
        config = load_config(files, arguments.overrides)
        config = replace(
            config,
            output_dir=folder,
            solver=replace(config.solver, max_epochs=arguments.epochs),
            test=replace(config.test, eval_period=1, eval_at_start=False, ranked_lists=0),
        )
        register_parts(config)
        seed_everything(config.seed)
        same_threads()
        device = pick_device(config.device)
        watch = Stopwatch(device)
        trainer = build_trainer(config, device, Recorder(watch, Path(folder)), signals)
        watch.attach(trainer)
        trainer.train()
    epochs = arguments.epochs - 1
    stages = {stage: value / epochs for stage, value in watch.seconds.items()}
    labels = stages.pop("hook RefreshPseudoLabels", 0.0)
    parts = stages.get("extraction", 0.0) + stages.get("clustering", 0.0)
    stages["memories and statistics"] = labels - parts
    total = sum(stages.values())
    rows = sorted(stages.items(), key=lambda item: -item[1])
    body = [(stage, f"{value:.3f}", f"{value / total:.1%}") for stage, value in rows]
    sys.stdout.write(
        tabulate(body, headers=("stage", "seconds an epoch", ""), disable_numparse=True) + "\n\n"
    )
    over_forward = stages.get("extraction", 0.0) * epochs / watch.forward if watch.forward else None
    ratio = round(over_forward, 3) if over_forward else None
    images, steps = len(trainer.loader.dataset), len(trainer.loader)  # type: ignore[arg-type]
    batch, inferred = watch.inferred
    inference = watch.inference.seconds() * inferred / max(batch, 1) / epochs
    parts_of_floor = {"training": steps * watch.steps.seconds(), "inference": inference}
    floor = Floor(parts_of_floor, watch.taken / epochs)
    report(
        "epoch",
        f"{', '.join(map(str, files))}: {images:,} images, {steps} steps of "
        f"{config.dataloader.sampler['batch_size']}",
        (total, None), None, None, floor, extraction_over_forward=ratio,
        device=str(device), stages={stage: round(value, 4) for stage, value in rows},
    )  # fmt: skip


if __name__ == "__main__":
    main()
