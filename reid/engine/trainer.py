"""The training loop and its hook points."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from reid import distributed
from reid.engine.nonfinite import (
    BufferCopy,
    LaterNumber,
    NonFiniteLosses,
    broken_parameters,
    check_finite,
    largest_activations,
)
from reid.engine.randomness import random_state, replaying, set_random_state, torch_random_state
from reid.engine.stopping import StopSignals
from reid.solver import load_state
from reid.structures import Batch, Embeddings

logger = logging.getLogger(__name__)

Amp = Literal["off", "fp16", "bf16"]
_AMP_DTYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Hook:
    """Something to do at the points of the training loop.

    The whole loop::

        hook.before_train(trainer)
        for trainer.epoch in range(trainer.epoch, trainer.max_epochs):
            hook.before_epoch(trainer)
            for batch in trainer.loader:
                trainer.run_step(batch)
                hook.after_step(trainer)
            hook.save(trainer)
            hook.after_epoch(trainer)
        hook.after_train(trainer)

    or, where a signal or an error ends it before that, ::

        hook.on_break(trainer)

    From `save` on, `trainer.epoch` is the number of finished epochs. A run that is resumed begins
    with `before_train` and the `after_epoch` of the epoch that was saved. Hooks are called in the
    order of the list, and a hook with state of its own returns it from `state_dict`.
    """

    def before_train(self, trainer: Trainer) -> None:
        """Once, before the first epoch."""

    def before_epoch(self, trainer: Trainer) -> None:
        """Before each epoch; the sampler's epoch is set, its labels may be changed here."""

    def after_step(self, trainer: Trainer) -> None:
        """After each batch; `trainer.losses` holds its losses, nothing if it was skipped."""

    def save(self, trainer: Trainer) -> None:
        """After the last step of each epoch, in one piece with it: no signal comes between."""

    def after_epoch(self, trainer: Trainer) -> None:
        """After each epoch, and once more where a run is resumed after it."""

    def after_train(self, trainer: Trainer) -> None:
        """Once, after the last epoch; not called when training ends in an error."""

    def on_break(self, trainer: Trainer) -> None:
        """Once, when a signal or an error ends training, perhaps in the middle of a hook.

        Other processes may be gone: nothing may be asked of them here.
        """

    def state_dict(self) -> dict[str, Any]:
        """State to keep in checkpoints: numbers, strings, tensors, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


class _Step(nn.Module):
    """Model and criterion as one module, so that DistributedDataParallel sees both.

    With several processes, each runs the model on its share of a batch, and all have the losses of
    the whole batch: no loss needs to know how many processes there are, and all of them look for
    hard samples in the whole batch. The gradients that DistributedDataParallel averages are then
    those of one process with the whole batch.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        embeddings: Embeddings = self.model(batch.image, batch.camid)
        if distributed.is_distributed():
            embeddings = Embeddings(*map(distributed.gather_with_gradient, embeddings))
            # The images stay where they are, losses have no use for them.
            batch = Batch(batch.image, *map(distributed.gather_rows, batch[1:]))
        losses: dict[str, Tensor] = self.criterion(embeddings, batch)
        return losses


class Trainer:
    """Trains a model: one loop for supervised and unsupervised training.

    Args:
        model: (image, camid) -> Embeddings; on `device`.
        criterion: (Embeddings, Batch) -> named losses, which are summed; on `device`.
        optimizer: Over the parameters of both.
        scheduler: Stepped once an epoch.
        loader: Yields `Batch`; its batch sampler has `set_epoch`.
        max_epochs: Epochs in all.
        device: Where to compute.
        amp: Mixed precision of the forward pass; `fp16` scales the loss. A step whose gradients
            overflow is left out and leaves no trace: running statistics and memories go back to
            what they were with the weights, while torch alone would keep those of such batches.
        accumulation_steps: Batches whose mean gradient makes one optimizer step. The last group
            of an epoch may be smaller, and is averaged over the batches it has.
        clip_grad_norm: Largest norm of the gradient; 0 = no clipping.
        hooks: See `Hook`.
        signals: What may interrupt training, though never in a step; none by default.
        nonfinite: What happens to a batch whose loss is not finite; by default it ends training.

    Attributes:
        epoch: The epoch that is running, or the number of finished epochs between two.
        step: Batches seen since the start of the first epoch.
        losses: The last batch's losses, detached, with their sum as `loss`; empty if the batch was
            skipped.
        data_time: Seconds that the last batch was waited for.
        step_time: Seconds of the last batch, waiting included.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        loader: DataLoader[Batch],
        *,
        max_epochs: int,
        device: torch.device,
        amp: Amp = "off",
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        hooks: Sequence[Hook] = (),
        signals: StopSignals | None = None,
        nonfinite: NonFiniteLosses | None = None,
    ) -> None:
        if amp not in _AMP_DTYPES:
            raise ValueError(f"amp: expected one of {', '.join(_AMP_DTYPES)}, got {amp!r}")
        if max_epochs < 1 or accumulation_steps < 1 or clip_grad_norm < 0:
            raise ValueError(
                "expected max_epochs >= 1, accumulation_steps >= 1, clip_grad_norm >= 0, got "
                f"{max_epochs}, {accumulation_steps}, {clip_grad_norm}"
            )
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loader = loader
        self.max_epochs = max_epochs
        self.device = device
        self.hooks = list(hooks)
        self.signals = signals or StopSignals()
        self.epoch = 0
        self.step = 0
        self.losses: dict[str, Tensor] = {}
        self.data_time = 0.0
        self.step_time = 0.0
        self._nonfinite = nonfinite or NonFiniteLosses()
        self._before: BufferCopy | None = None
        self._signum = 0
        self._amp_dtype = _AMP_DTYPES[amp]
        self._scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self._accumulation_steps = accumulation_steps
        self._clip_grad_norm = clip_grad_norm
        self._step_module: nn.Module = _Step(model, criterion)
        if distributed.is_distributed():
            # What no loss reaches keeps a gradient of None, as in one process.
            self._step_module = DistributedDataParallel(
                self._step_module, find_unused_parameters=True
            )

    def train(self) -> None:
        """Trains from the present epoch to the last.

        Raises:
            FloatingPointError: A loss, or the model after an epoch, is not finite.
            Interrupted: A signal came; with several processes, to any of them.
        """
        try:
            self._train()
        except BaseException:
            for hook in self.hooks:
                hook.on_break(self)
            raise

    def _train(self) -> None:
        for hook in self.hooks:
            hook.before_train(self)
        if self.epoch:  # resumed
            self._after_epoch()
        while self.epoch < self.max_epochs:
            self.loader.batch_sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
            for hook in self.hooks:
                hook.before_epoch(self)
            # processes wait for each other in every step, so that they must stop after the same
            with self.signals.delayed() if distributed.is_distributed() else nullcontext():
                self._run_epoch()
            self._after_epoch()
        for hook in self.hooks:
            hook.after_train(self)

    def _run_epoch(self) -> None:
        self.model.train()
        self.criterion.train()
        self.optimizer.zero_grad()
        self._before = None
        last = len(self.loader)
        started = time.perf_counter()
        for number, batch in enumerate(self.loader):
            self.data_time = time.perf_counter() - started
            group = number - number % self._accumulation_steps
            with self.signals.delayed():
                self.run_step(
                    batch.to(self.device),
                    share=1 / min(self._accumulation_steps, last - group),
                    update=(number + 1) % self._accumulation_steps == 0 or number + 1 == last,
                )
                self.step += 1
                self.step_time = time.perf_counter() - started
                for hook in self.hooks:
                    hook.after_step(self)
                if number + 1 == last:
                    self._end_epoch()
            if self._signum:
                self.signals.stop(self._signum)
            started = time.perf_counter()

    def _end_epoch(self) -> None:
        check_finite(self._step_module, self.epoch + 1)
        self.scheduler.step()
        self.epoch += 1
        for hook in self.hooks:
            hook.save(self)

    def _after_epoch(self) -> None:
        for hook in self.hooks:
            hook.after_epoch(self)

    def run_step(self, batch: Batch, share: float = 1.0, update: bool = True) -> None:
        """Forward and backward of one batch.

        Args:
            batch: On the trainer's device.
            share: Weight of this batch's gradient in the sum of an accumulation group.
            update: Whether the optimizer takes a step after this batch.

        Raises:
            FloatingPointError: The loss is not finite, on this process or another.
        """
        drawn_from = torch_random_state(self.device)
        may_be_left_out = self._nonfinite.action == "skip" or self._scaler.is_enabled()
        if may_be_left_out and self._before is None:  # the first batch of an accumulation group
            self._before = BufferCopy(self._step_module)
        with self._autocast():
            losses = self._step_module(batch)
        total = torch.stack([*losses.values()]).sum()
        later = LaterNumber(total)
        self._scaler.scale(total * share).backward()  # type: ignore[no-untyped-call]
        self.losses = {"loss": total.detach()} | {k: v.detach() for k, v in losses.items()}
        # The GPU is busy with the backward pass while this waits for the end of the forward pass.
        # What becomes infinite in the backward pass of fp16 is the scaler's business.
        own = not math.isfinite(later)
        broken, self._signum = distributed.largest(own, self.signals.signum)
        if broken:
            self.optimizer.zero_grad()
            if self._before is not None:
                self._before.restore()
            self._meet_nonfinite(batch, drawn_from, own)
            self.losses = {}
        elif update:
            self._update()
        if update:
            self._before = None

    def _update(self) -> None:
        if self._clip_grad_norm:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._step_module.parameters(), self._clip_grad_norm)
        self._scaler.step(self.optimizer)
        if self._scaler.is_enabled():
            assert self._before is not None
            # Gradients are the same in every process; only the device knows whether they overflow.
            (overflow,) = self._scaler._found_inf_per_device(self.optimizer).values()
            self._before.restore(overflow > 0)
        self._scaler.update()
        self.optimizer.zero_grad()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, self._amp_dtype, enabled=self._amp_dtype is not torch.float32
        )

    def _meet_nonfinite(self, batch: Batch, drawn_from: Mapping[str, Tensor], own: bool) -> None:
        before = BufferCopy(self.model)
        with replaying(self.device, drawn_from), self._autocast():
            activations, first = largest_activations(
                self.model, lambda: self.model(batch.image, batch.camid)
            )
        before.restore()
        report = {
            "step": self.step + 1,
            "epoch": self.epoch + 1,
            "losses": {name: float(value) for name, value in self.losses.items()},
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss_scale": self._scaler.get_scale(),
            "parameters_not_finite": broken_parameters(self.model),
            "first_module_not_finite": first,
            "activations": activations,
        }
        self._nonfinite.meet(report, batch.index.tolist(), own=own)

    def state_dict(self) -> dict[str, Any]:
        """All that `after_epoch` and the next epoch depend on.

        Pseudo-labels and memories are made anew.
        """
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "skipped": self._nonfinite.skipped,
            "random": distributed.gather_objects(random_state(self.device)),
            "hooks": [{"name": type(hook).__name__, **hook.state_dict()} for hook in self.hooks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Learning rate, weight decay and the like stay those that this trainer was built with. A hook
        that the other run did not have starts anew; a warning names it, and those that are gone.

        Raises:
            ValueError: The state is of a run with another number of processes, or does not fit.
            RuntimeError: The state is of another model.
        """
        if len(state["random"]) != distributed.world_size():
            raise ValueError(
                f"the checkpoint is of a run with {len(state['random'])} processes, "
                f"this one has {distributed.world_size()}"
            )
        self.model.load_state_dict(state["model"])
        self.criterion.load_state_dict(state["criterion"])
        load_state(self.optimizer, self.scheduler, state["optimizer"], state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        self._nonfinite.skipped = state["skipped"]
        self._load_hooks(state["hooks"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        set_random_state(state["random"][distributed.rank()], self.device)

    def _load_hooks(self, states: Sequence[Mapping[str, Any]]) -> None:
        saved: dict[str, list[dict[str, Any]]] = {}
        for state in states:
            kept = {key: value for key, value in state.items() if key != "name"}
            saved.setdefault(state["name"], []).append(kept)
        added = []
        for hook in self.hooks:
            name = type(hook).__name__
            if saved.get(name):
                hook.load_state_dict(saved[name].pop(0))
            else:
                added.append(name)
        gone = [name for name, rest in saved.items() for _ in rest]
        if added or gone:
            logger.warning(
                "The run that made the checkpoint had other hooks: %s",
                "; ".join(
                    f"{what} {', '.join(names)}"
                    for what, names in (("it did not have", added), ("it alone had", gone))
                    if names
                ),
            )
