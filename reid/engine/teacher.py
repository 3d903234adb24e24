"""A teacher: a network whose weights are the moving average of the student's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from reid.engine.checkpoint_schema import check_tensors
from reid.engine.trainer import Trainer
from reid.modeling.batchnorm import GroupedBatchNorm
from reid.modeling.losses import STUDENT
from reid.registry import HOOK, ConfigError, Hook


@HOOK.register()
class MeanTeacher(Hook):
    """A moving average of a student, which losses can use as the network `teacher`.

    Tarvainen and Valpola, *Mean teachers are better role models* (NeurIPS 2017). After each step
    of the optimizer, theta' <- a theta' + (1 - a) theta. Losses name the teacher in `asks_for`. It
    runs in training mode there: BatchNorm takes the batch's statistics.

    Args:
        momentum: a, the share of the old teacher in the new one.
        ramp: Limit a to 1 - 1 / t in step t, counted from 1: the first step copies the student.
        statistics: BatchNorm's running statistics, which extraction uses: `copy` the student's,
            `average` them as the parameters, or keep the teacher's `own`, which its forward passes
            move (MMT, ICE).
        shuffle: Form the teacher's groups of `MODEL.BN_SAMPLES_PER_GROUP` images at random in each
            step, the same for all views (ShuffleBN: He et al., *Momentum Contrast*, CVPR 2020).
        inference: Cluster, test and save the teacher instead of the model.
        student: The network that it follows: `student`, or `student2` and so on (`model.students`).
        from_stage: The stage of the config, from 0, in which it begins; before, it equals the
            student. The ramp counts from there.
        teacher: Its name for losses, and for their parts that follow it (`Loss.followers`).

    Raises:
        ValueError: The momentum is not in [0, 1), or the teacher has the name of a student.
    """

    def __init__(
        self,
        momentum: float = 0.999,
        ramp: bool = True,
        statistics: Literal["copy", "average", "own"] = "copy",
        shuffle: bool = False,
        inference: bool = True,
        student: str = STUDENT[0],
        teacher: str = "teacher",
        from_stage: int = 0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected 0 <= momentum < 1, got {momentum}")
        if teacher == student:
            raise ValueError(f"teacher: expected another name than the student's, got {teacher}")
        self._momentum = momentum
        self._ramp = ramp
        self._statistics = statistics
        self._shuffle = shuffle
        self._inference = inference
        self._student = student
        self._name = teacher
        self._from_stage = from_stage
        self._first_step: int | None = 0 if not from_stage else None
        self._teacher: nn.Module | None = None
        self._loaded: Mapping[str, Any] | None = None

    def before_train(self, trainer: Trainer) -> None:
        """Creates the teacher as a copy of the student, or from a checkpoint.

        Raises:
            ConfigError: The student does not exist, or two networks have the same name.
        """
        taken = (*trainer.students, *trainer.networks)
        if self._name in taken:
            raise ConfigError(
                f"hooks: MeanTeacher's teacher {self._name!r} is the name of another network; "
                "give each teacher a name of its own"
            )
        self._teacher = copy.deepcopy(self._followed(trainer)).requires_grad_(False).train()
        vars(self._teacher).pop("forward", None)  # a compiled `forward` would run the student
        if self._loaded is not None:
            self._teacher.load_state_dict(self._loaded)
        trainer.networks[self._name] = self._teacher
        self._shuffle_groups(trainer.step)
        if self._inference:
            trainer.inference_model = self._teacher

    def before_stage(self, trainer: Trainer, ended: nn.Module | None) -> None:
        """Begins to average, if this is the stage."""
        if self._first_step is None and trainer.stage.number >= self._from_stage:
            self._first_step = trainer.step

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        """Moves the teacher if the optimizer has taken a step."""
        if self._teacher is None:
            return
        self._shuffle_groups(trainer.step)
        if trainer.taken is False:
            return
        begun = self._first_step is not None
        keep = self._momentum if begun else 0.0
        if begun and self._ramp:
            keep = min(keep, 1 - 1 / (trainer.step - (self._first_step or 0)))
        students = dict(self._followed(trainer).named_parameters())
        for name, mine in self._teacher.named_parameters():
            self._move(mine, students[name], keep, trainer.taken)
        for follower, followed in trainer.criterion.followers(self._name):
            self._move(follower, followed, keep, trainer.taken)
        if self._statistics == "own" and begun:
            return
        buffers = dict(self._followed(trainer).named_buffers())
        for name, buffer in self._teacher.named_buffers():
            average = self._statistics == "average" and buffer.is_floating_point()
            self._move(buffer, buffers[name], keep if average else 0.0, trainer.taken)

    def _followed(self, trainer: Trainer) -> nn.Module:
        if self._student not in trainer.students:
            raise ConfigError(
                f"hooks: MeanTeacher's student {self._student!r} does not exist; known: "
                f"{', '.join(trainer.students)}. model.students adds further ones"
            )
        return trainer.students[self._student]

    def _shuffle_groups(self, step: int) -> None:
        """Chooses BatchNorm's groups of the next step: all processes and resumed runs alike."""
        if self._shuffle and self._teacher is not None:
            for module in self._teacher.modules():
                if isinstance(module, GroupedBatchNorm):
                    module.shuffle = step

    @staticmethod
    def _move(
        mine: torch.Tensor, students: torch.Tensor, keep: float, taken: bool | torch.Tensor
    ) -> None:
        moved = torch.lerp(students, mine, keep) if keep else students
        mine.copy_(moved if taken is True else torch.where(torch.as_tensor(taken), moved, mine))

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights, and when it began."""
        if self._teacher is None:
            return {}
        return {"teacher": self._teacher.state_dict(), "first_step": self._first_step}

    def check_state(self, state: Mapping[str, Any], trainer: Trainer, epoch: int) -> None:
        """Checks that the teacher has the student's tensors.

        Raises:
            ValueError: It has others, or `first_step` is no number of steps.
        """
        first = state.get("first_step", 0)
        if first is not None and not (type(first) is int and first >= 0):
            raise ValueError(f"first_step: expected a number of steps or none, got {first!r}")
        check_tensors(state.get("teacher"), self._followed(trainer).state_dict(), "teacher")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stores the teacher's weights until `before_train` creates the teacher."""
        self._loaded = state["teacher"]
        self._first_step = state.get("first_step", 0)
