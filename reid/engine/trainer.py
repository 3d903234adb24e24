"""The training loop: one step, one epoch, what a checkpoint holds, and the order of all of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from reid import distributed
from reid.engine.checkpoint_schema import check_checkpoint, check_stage, check_students
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
from reid.engine.resuming import compare_course, match_hooks, named
from reid.engine.stages import Stages, carry_losses
from reid.engine.step import Seen, build_step
from reid.engine.stopping import StopSignals
from reid.modeling.classifiers import fit_classifiers
from reid.modeling.losses import STUDENT, Criterion
from reid.registry import Hook
from reid.stage_settings import StageRun
from reid.structures import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that its files carry.

    Attributes:
        about: What each weights file says about its training.
        course: What the run's exact bits depend on beside the config: the images and the number of
            CPU threads. A resumed run warns of differences.
    """

    about: Mapping[str, str] = field(default_factory=dict)
    course: Mapping[str, str] = field(default_factory=dict)


class Trainer:
    """Trains a model: one loop for supervised and unsupervised training.

    Args:
        model: Batch -> Embeddings; on `device`.
        criterion: Embeddings and batch -> named losses, which are summed; on `device`.
        optimization: Trains the parameters of model and criterion.
        loader: Yields `Batch`; its batch sampler has `set_epoch`.
        max_epochs: Epochs of the whole run.
        device: Where training computes.
        hooks: Called in this order; see `Hook`.
        facts: What checkpoints and weights files say about the run.
        signals: May interrupt training, but never within a step; none by default. Their deadline
            ends training after a whole epoch.
        nonfinite: Handles a batch whose loss is not finite; by default such a batch ends training.
        stages: The stages of the run, if it has several; `criterion`, `optimization` and `loader`
            are those of the first one.
        more_students: Networks that are trained beside the model, by name; on `device`.

    Attributes:
        students: All trained networks by name; `student` is the model.
        stage: The stage that the epoch is in; a run without stages is one stage.
        epoch: Finished epochs, which is also the index of the running epoch, from 0.
        step: Batches seen since the start of the first epoch.
        losses: The last batch's losses, detached, with their sum as `loss`; empty if the batch was
            skipped.
        networks: Further networks that losses may ask for, by name, such as a teacher.
        inference_model: The network that is clustered, tested and saved: the model or its teacher.
        clustered_model: Clustered in place of `inference_model`, such as the mean of two teachers;
            None: that is clustered itself.
        also_tested: Networks that are tested beside `inference_model`, by name.
        taken: Whether the optimizer took a step after the last batch: True or False, or a ()
            bool tensor where only the device knows (fp16).
        data_time: Seconds that training waited for the last batch.
        step_time: Seconds that the last batch took, including the wait.

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
        facts: RunFacts | None = None,
        signals: StopSignals | None = None,
        nonfinite: NonFiniteLosses | None = None,
        stages: Stages | None = None,
        more_students: Mapping[str, nn.Module] | None = None,
    ) -> None:
        if max_epochs < 1:
            raise ValueError(f"max_epochs: expected 1 or more, got {max_epochs}")
        self.model = model
        self.students = {STUDENT[0]: model, **(more_students or {})}
        self.inference_model = model
        self.clustered_model: nn.Module | None = None
        self.also_tested: dict[str, nn.Module] = {}
        self.networks: dict[str, nn.Module] = {}
        self.criterion = criterion
        self.optimization = optimization
        self.loader = loader
        self.max_epochs = max_epochs
        self.device = device
        self.hooks = list(hooks)
        self.facts = facts or RunFacts()
        self.signals = signals or StopSignals()
        self.epoch = 0
        self.step = 0
        self.losses: dict[str, Tensor] = {}
        self.taken: bool | Tensor = False
        self.data_time = 0.0
        self.step_time = 0.0
        self._nonfinite = nonfinite or NonFiniteLosses()
        self._waiting: list[Seen] = []
        self._signum = 0
        self._stages = stages
        self.stage = StageRun(0, "", 0, max_epochs) if stages is None else stages.at(0)
        self._stage_step = 0
        self._step_module = build_step(self.students, criterion, self.networks)

    def train(self) -> None:
        """Trains from the current epoch to the last one.

        Raises:
            FloatingPointError: A loss, or the model after an epoch, is not finite.
            Interrupted: This process, or any other process of the run, received a signal.
            TimeIsUp: The deadline has passed, and epochs are left.
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
            self._begin_stage()
            self.loader.batch_sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
            for hook in self.hooks:
                hook.before_epoch(self)
            # All processes must stop after the same step, or the others wait forever.
            with self.signals.delayed() if distributed.is_distributed() else nullcontext():
                self._run_epoch()
            if self.epoch < self.max_epochs:  # after the last epoch, only results are missing
                self.signals.check_time()
            self._after_epoch()
        for hook in self.hooks:
            hook.after_train(self)

    def _begin_stage(self) -> None:
        """At the start of a stage: takes its parts, and tells the hooks."""
        stage = self.stage if self._stages is None else self._stages.at(self.epoch)
        if stage.start != self.epoch:
            return
        ended = None
        if stage != self.stage:
            ended = self.criterion
            self._take_stage(stage)
            if stage.losses == "carried":
                carry_losses(ended, self.criterion)
        self._stage_step = self.step
        if self._stages is not None:
            logger.info("%s", self._stages.title(stage))
        for hook in self.hooks:
            hook.before_stage(self, ended)

    def _take_stage(self, stage: StageRun) -> None:
        assert self._stages is not None
        parts = self._stages.build(stage)
        self.stage = stage
        self.criterion = parts.criterion
        self.optimization = parts.optimization
        self.loader = parts.loader
        self._waiting.clear()
        del self._step_module  # see `build_step`
        self._step_module = build_step(self.students, self.criterion, self.networks)

    def _run_epoch(self) -> None:
        for student in self.students.values():
            self.optimization.set_modes(student, self.epoch - self.stage.start)
        self.criterion.train()
        self.optimization.discard()
        self.optimization.follow_refills(self.criterion)
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
        for module in (self._step_module, *self.networks.values()):
            check_finite(module, self.epoch + 1)
        self.epoch += 1
        for hook in self.hooks:
            hook.save(self)

    def _after_epoch(self) -> None:
        for hook in self.hooks:
            hook.after_epoch(self)

    def run_step(self, batch: Batch, share: float = 1.0, update: bool = True) -> None:
        """Runs one batch forward and backward.

        Args:
            batch: On the trainer's device.
            share: Weight of this batch's gradient in the sum of an accumulation group.
            update: Whether the optimizer takes a step after this batch.

        Raises:
            FloatingPointError: The loss is not finite, on this process or another.
        """
        drawn_from = torch_random_state(self.device)
        epoch, step = self.epoch - self.stage.start, self.step - self._stage_step
        # Batches that are dropped must not move a teacher's own running statistics either.
        moving = nn.ModuleList([*self.students.values(), *self.networks.values()])
        self.optimization.begin(moving, epoch, step)
        with self.optimization.autocast():
            losses, seen = self._step_module(batch)
        total = torch.stack([*losses.values()]).sum()
        later = LaterNumber(total)
        self.optimization.backward(total * share)
        self.losses = {"loss": total.detach()} | {k: v.detach() for k, v in losses.items()}
        self._remember(seen)
        self.taken = False
        # This waits only for the forward pass; the GPU goes on with the backward pass meanwhile.
        # The scaler handles gradients that overflow in fp16.
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

    def _remember(self, seen: Seen) -> None:
        """Stores what the criterion will commit after the optimizer's step."""
        embeddings, batch = seen
        if self.optimization.accumulation_steps > 1:
            # With CUDA graphs, the next batch's forward pass may overwrite these tensors.
            embeddings = {source: value.map(Tensor.clone) for source, value in embeddings.items()}
        self._waiting.append((embeddings, batch))

    def _report_nonfinite(self, batch: Batch, drawn_from: Mapping[str, Tensor], here: bool) -> None:
        students = nn.ModuleDict(self.students) if len(self.students) > 1 else self.model
        before = BufferCopy(students)
        with replaying(self.device, drawn_from), self.optimization.autocast():
            activations, first = largest_activations(
                students, lambda: [student(batch) for student in self.students.values()]
            )
        before.restore()
        report = {
            "step": self.step + 1,
            "epoch": self.epoch + 1,
            "losses": {name: float(value) for name, value in self.losses.items()},
            "lr": self.optimization.lr,
            "loss_scale": self.optimization.loss_scale,
            "parameters_not_finite": broken_parameters(students),
            "first_module_not_finite": first,
            "activations": activations,
        }
        self._nonfinite.handle(report, batch.index.tolist(), here=here)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `after_epoch` and the next epoch depend on.

        Labels and memories that every epoch makes anew are left out.
        """
        stage = {} if self._stages is None else {"stage": {"first_step": self._stage_step}}
        students = {name: student.state_dict() for name, student in self._more_students()}
        return {
            **stage,
            **({"students": students} if students else {}),
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            **self.optimization.state_dict(),
            "skipped": self._nonfinite.skipped,
            "random": distributed.gather_objects(random_state(self.device)),
            "hooks": [{"name": type(hook).__name__, **hook.state_dict()} for hook in self.hooks],
            "about": dict(self.facts.about),
            "course": dict(self.facts.course),
        }

    def _more_students(self) -> list[tuple[str, nn.Module]]:
        return [(name, network) for name, network in self.students.items() if name != STUDENT[0]]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, after checking all of it.

        The learning rate, weight decay and other settings stay as this trainer was built. A hook
        that the saved run did not have starts fresh. A warning names hooks that were added or
        removed.

        Raises:
            ValueError: The state belongs to another model or another number of processes, or an
                entry is wrong; the message names the entry.
        """
        if self._stages is not None:
            check_stage(state)
            stage = self._stages.at(state["epoch"] - 1)  # the stage that wrote it
            if stage != self.stage:
                self._take_stage(stage)
        check_students(
            state, {name: student.state_dict() for name, student in self._more_students()}
        )
        fit_classifiers(self.criterion, state.get("criterion"))
        check_checkpoint(
            state,
            model=self.model.state_dict(),
            criterion=self.criterion.state_dict(),
            optimizer=self.optimization.optimizer,
            device_type=self.device.type,
            processes=distributed.world_size(),
        )
        states = match_hooks(self.hooks, state["hooks"])
        for hook, own in states:
            with named(hook):
                hook.check_state(own, self, state["epoch"])
        compare_course(self.facts.course, state.get("course", {}))
        self.model.load_state_dict(state["model"])
        for name, student in self._more_students():
            student.load_state_dict(state["students"][name])
        self.criterion.load_state_dict(state["criterion"])
        self.optimization.load_state_dict(state)
        self._nonfinite.skipped = state["skipped"]
        for hook, own in states:
            with named(hook):
                hook.load_state_dict(own)
        self.epoch = state["epoch"]
        self.step = state["step"]
        self._stage_step = state["stage"]["first_step"] if self._stages is not None else 0
        set_random_state(state["random"][distributed.rank()], self.device)
