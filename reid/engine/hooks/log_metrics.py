"""Logs losses, learning rate and times during training."""

from __future__ import annotations

import logging
import resource
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reid import distributed
from reid.engine.metrics import MetricWriter
from reid.engine.trainer import Trainer
from reid.registry import Hook

logger = logging.getLogger(__name__)

_LONGEST_ETA_S = 10**10  # three hundred years; a clock has bounds too


class LogMetrics(Hook):
    """Logs one aligned line every `period` iterations, and writes the same numbers to `writer`.

    Losses and times are means over the iterations since the last line. Losses stay on their device
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
        self._started = 0.0
        self._first_epoch = 0
        self._bar: tqdm[Any] | None = None

    def before_train(self, trainer: Trainer) -> None:
        """Starts the clock that the ETA is computed from."""
        self._started = time.perf_counter()
        self._first_epoch = trainer.epoch

    def before_epoch(self, trainer: Trainer) -> None:
        """Opens the epoch's progress bar, on a terminal."""
        self._done = 0
        self._bar = tqdm(
            total=len(trainer.loader),
            desc=f"Epoch {trainer.epoch + 1}/{trainer.max_epochs}",
            leave=False,
            disable=None if distributed.is_main() else True,
        )

    def after_step(self, trainer: Trainer) -> None:
        """Adds up losses and times; logs at the end of a period and of an epoch."""
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
        """Closes the epoch's progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_break(self, trainer: Trainer) -> None:
        """Closes the epoch's progress bar."""
        self.after_epoch(trainer)

    def _log(self, trainer: Trainer, done: int) -> None:
        losses = {name: float(value) / self._counted for name, value in self._sums.items()}
        data_time, step_time = self._data_time / self._count, self._step_time / self._count
        # The clock also runs during extraction, clustering and evaluation: the ETA includes them.
        share = done / len(trainer.loader)
        spent = time.perf_counter() - self._started
        left = (trainer.max_epochs - trainer.epoch - share) / (
            trainer.epoch - self._first_epoch + share
        )
        eta = timedelta(seconds=round(min(left * spent, _LONGEST_ETA_S)))
        numbers = {
            **losses,
            "lr": trainer.optimization.lr,
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


def memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of torch's tensors on a GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**10 if sys.platform != "darwin" else peak / 2**20
