"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from reid import distributed
from reid.engine.checkpoint_schema import check_checkpoint
from reid.engine.nonfinite import (
    BufferCopy,
    LaterNumber,
    NonFiniteLosses,
    broken_parameters,
    check_finite,
    largest_activations,
)
from reid.engine.optimization import Optimization
from reid.engine.randomness import random_state, replaying, set_random_state, torch_random_state
from reid.engine.stopping import StopSignals
from reid.modeling.losses import STUDENT, Criterion, Source
from reid.registry import Hook
from reid.structures import Batch, Embeddings

logger = logging.getLogger(__name__)

_FORMER_HOOKS = ("WarmUp",)  # in checkpoints of version 0.1; the rate has it now
_Seen = tuple[dict[Source, Embeddings], Batch]
"""What a criterion has seen of a batch."""


class _Step(nn.Module):
    """Model and criterion as one module, so that DistributedDataParallel sees both.

    With several processes, each runs the model on its share of a batch, and all have the losses of
    the whole batch: no loss needs to know how many processes there are, and all of them look for
    hard samples in the whole batch. The gradients that DistributedDataParallel averages are then
    those of one process with the whole batch.
    """

    def __init__(
        self, model: nn.Module, criterion: Criterion, networks: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self._networks = networks  # a plain mapping: they have no gradients, and are no submodules

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], _Seen]:
        """The losses, and what `Criterion.commit` is to be given."""
        embeddings = {source: self._embed(batch, *source) for source in self.criterion.asks_for}
        # Images stay where they are: losses do not use them.
        gathered = batch.without_pixels().map(distributed.gather_rows)
        losses: dict[str, Tensor] = self.criterion(embeddings, gathered)
        seen = {source: value.map(Tensor.detach) for source, value in embeddings.items()}
        return losses, (seen, gathered)

    def _embed(self, batch: Batch, network: str, view: int) -> Embeddings:
        """The embeddings of the whole batch, from all processes."""
        if view:
            batch = batch._replace(image=batch.views[view - 1])
        if network == STUDENT[0]:
            own: Embeddings = self.model(batch)
            return own.map(distributed.gather_with_gradient)
        with torch.no_grad():
            own = self._networks[network](batch)
            return own.map(distributed.gather_rows)


class Trainer:
    """Trains a model: one loop for supervised and unsupervised training.

    Args:
        model: Batch -> Embeddings; on `device`.
        criterion: Embeddings and batch -> named losses, which are summed; on `device`.
        optimization: Of the parameters of both.
        loader: Yields `Batch`; its batch sampler has `set_epoch`.
        max_epochs: Epochs in all.
        device: Where to compute.
        hooks: See `Hook`.
        about: What weights files say of their training.
        course: What else the bits of the run depend on; a resumed run is warned of a difference.
        signals: What may interrupt training, though never in a step; none by default.
        nonfinite: What happens to a batch whose loss is not finite; by default it ends training.

    Attributes:
        epoch: The epoch that is running, or the number of finished epochs between two.
        step: Batches seen since the start of the first epoch.
        losses: The last batch's losses, detached, with their sum as `loss`; empty if the batch was
            skipped.
        networks: Networks beside the model that losses may ask for, by name, such as a teacher.
        inference_model: What is clustered, tested and saved: the model, or its teacher.
        taken: Whether the last batch ended in a step of the optimizer: True or False, or a ()
            bool tensor where only the device knows (fp16).
        data_time: Seconds that the last batch was waited for.
        step_time: Seconds of the last batch, waiting included.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimization: Optimization,
        loader: DataLoader[Batch],
        *,
        max_epochs: int,
        device: torch.device,
        hooks: Sequence[Hook] = (),
        about: Mapping[str, str] = MappingProxyType({}),
        course: Mapping[str, str] = MappingProxyType({}),
        signals: StopSignals | None = None,
        nonfinite: NonFiniteLosses | None = None,
    ) -> None:
        if max_epochs < 1:
            raise ValueError(f"max_epochs: expected 1 or more, got {max_epochs}")
        self.model = model
        self.inference_model = model
        self.networks: dict[str, nn.Module] = {}
        self.criterion = criterion
        self.optimization = optimization
        self.loader = loader
        self.max_epochs = max_epochs
        self.device = device
        self.hooks = list(hooks)
        self.about = dict(about)
        self._course = dict(course)
        self.signals = signals or StopSignals()
        self.epoch = 0
        self.step = 0
        self.losses: dict[str, Tensor] = {}
        self.taken: bool | Tensor = False
        self.data_time = 0.0
        self.step_time = 0.0
        self._nonfinite = nonfinite or NonFiniteLosses()
        self._waiting: list[_Seen] = []
        self._signum = 0
        self._step_module: nn.Module = _Step(model, criterion, self.networks)
        if distributed.is_distributed():
            # Parameters no loss uses keep `grad=None`, as with one process.
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
            # All processes must stop after the same step, or the others wait forever.
            with self.signals.delayed() if distributed.is_distributed() else nullcontext():
                self._run_epoch()
            self._after_epoch()
        for hook in self.hooks:
            hook.after_train(self)

    def _run_epoch(self) -> None:
        self.model.train()
        self.criterion.train()
        self.optimization.discard()
        self._waiting.clear()
        count = len(self.loader)
        started = time.perf_counter()
        for number, batch in enumerate(self.loader):
            self.data_time = time.perf_counter() - started
            with self.signals.delayed():
                self.run_step(batch.to(self.device), *self.optimization.position(number, count))
                self.step += 1
                self.step_time = time.perf_counter() - started
                for hook in self.hooks:
                    hook.after_step(self)
                if number + 1 == count:
                    self._end_epoch()
            if self._signum:
                self.signals.stop(self._signum)
            started = time.perf_counter()

    def _end_epoch(self) -> None:
        check_finite(self._step_module, self.epoch + 1)
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
        self.optimization.begin(self.model, self.epoch, self.step)
        with self.optimization.autocast():
            losses, seen = self._step_module(batch)
        total = torch.stack([*losses.values()]).sum()
        later = LaterNumber(total)
        self.optimization.backward(total * share)
        self.losses = {"loss": total.detach()} | {k: v.detach() for k, v in losses.items()}
        self._remember(seen)
        self.taken = False
        # The GPU is busy with the backward pass while this waits for the end of the forward pass.
        # What becomes infinite in the backward pass of fp16 is the scaler's business.
        here = not math.isfinite(later)
        broken, self._signum = distributed.largest(here, self.signals.signum)
        if broken:
            self.optimization.discard()
            self._waiting.clear()
            self._report_nonfinite(batch, drawn_from, here)
            self.losses = {}
        elif update:
            taken = self.optimization.step()
            for embeddings, gathered in self._waiting:
                self.criterion.commit(embeddings, gathered, taken)
            self._waiting.clear()
            self.taken = True if taken is None else taken

    def _remember(self, seen: _Seen) -> None:
        """Keeps what the criterion commits once the optimizer has taken its step."""
        embeddings, batch = seen
        if self.optimization.accumulation_steps > 1:
            # The next batch's forward pass may overwrite them where CUDA graphs run.
            embeddings = {source: value.map(Tensor.clone) for source, value in embeddings.items()}
        self._waiting.append((embeddings, batch))

    def _report_nonfinite(self, batch: Batch, drawn_from: Mapping[str, Tensor], here: bool) -> None:
        before = BufferCopy(self.model)
        with replaying(self.device, drawn_from), self.optimization.autocast():
            activations, first = largest_activations(self.model, lambda: self.model(batch))
        before.restore()
        report = {
            "step": self.step + 1,
            "epoch": self.epoch + 1,
            "losses": {name: float(value) for name, value in self.losses.items()},
            "lr": self.optimization.lr,
            "loss_scale": self.optimization.loss_scale,
            "parameters_not_finite": broken_parameters(self.model),
            "first_module_not_finite": first,
            "activations": activations,
        }
        self._nonfinite.handle(report, batch.index.tolist(), here=here)

    def state_dict(self) -> dict[str, Any]:
        """All that `after_epoch` and the next epoch depend on.

        Pseudo-labels and memories are made anew.
        """
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            **self.optimization.state_dict(),
            "skipped": self._nonfinite.skipped,
            "random": distributed.gather_objects(random_state(self.device)),
            "hooks": [{"name": type(hook).__name__, **hook.state_dict()} for hook in self.hooks],
            "about": self.about,
            "course": self._course,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Learning rate, weight decay and the like stay those that this trainer was built with. A hook
        that the other run did not have starts anew; a warning names it, and those that are gone.

        Everything is checked before anything is loaded.

        Raises:
            ValueError: The state is of a run with another number of processes or of another model,
                or an entry is not what it should be; names it.
        """
        check_checkpoint(
            state,
            model=self.model.state_dict(),
            criterion=self.criterion.state_dict(),
            optimizer=self.optimization.optimizer,
            device_type=self.device.type,
            processes=distributed.world_size(),
        )
        states = self._match_hooks(state["hooks"])
        for hook, own in states:
            with _named(hook):
                hook.check_state(own, self, state["epoch"])
        self._compare_course(state.get("course", {}))
        self.model.load_state_dict(state["model"])
        self.criterion.load_state_dict(state["criterion"])
        self.optimization.load_state_dict(state)
        self._nonfinite.skipped = state["skipped"]
        for hook, own in states:
            with _named(hook):
                hook.load_state_dict(own)
        self.epoch = state["epoch"]
        self.step = state["step"]
        set_random_state(state["random"][distributed.rank()], self.device)

    def _compare_course(self, before: object) -> None:
        if not isinstance(before, Mapping):
            raise ValueError(f"course: expected a mapping, got {type(before).__name__}")
        changed = [name for name, now in self._course.items() if before.get(name, now) != now]
        if "images" in changed:
            logger.warning(
                "The training images have changed since the checkpoint was written: paths or sizes "
                "of files are others. Training goes on with those that are there now"
            )
        if "cpu_threads" in changed:
            logger.warning(
                "The run had %s CPU threads and now has %s: sums round in another way, so it will "
                "not end with the same bits (OMP_NUM_THREADS sets them)",
                before["cpu_threads"],
                self._course["cpu_threads"],
            )

    def _match_hooks(
        self, states: Sequence[Mapping[str, Any]]
    ) -> list[tuple[Hook, dict[str, Any]]]:
        """Hooks with their states; warns of those that only one of the two runs has."""
        saved: dict[str, list[dict[str, Any]]] = {}
        for state in states:
            own = {key: value for key, value in state.items() if key != "name"}
            saved.setdefault(state["name"], []).append(own)
        matched, added = [], []
        for hook in self.hooks:
            name = type(hook).__name__
            if saved.get(name):
                matched.append((hook, saved[name].pop(0)))
            else:
                added.append(name)
        gone = [name for name, rest in saved.items() for _ in rest if name not in _FORMER_HOOKS]
        if added or gone:
            logger.warning(
                "The run that made the checkpoint had other hooks: %s",
                "; ".join(
                    f"{what} {', '.join(names)}"
                    for what, names in (("it did not have", added), ("it alone had", gone))
                    if names
                ),
            )
        return matched


@contextmanager
def _named(hook: Hook) -> Iterator[None]:
    """Has what a hook finds wrong with its state name the hook.

    Raises:
        ValueError: In place of the errors that values of other types and shapes lead to.
    """
    name = f"hooks: the state of {type(hook).__name__}"
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
