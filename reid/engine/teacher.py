"""A teacher: a network whose weights are the moving average of the student's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from reid.engine.checkpoint_schema import check_tensors
from reid.engine.trainer import Trainer
from reid.registry import HOOK, Hook


@HOOK.register()
class MeanTeacher(Hook):
    """Keeps a moving average of the model, which losses may ask for as the network `teacher`.

    Tarvainen and Valpola, *Mean teachers are better role models* (NeurIPS 2017). After each step
    that the optimizer takes, theta' <- a theta' + (1 - a) theta. Losses name it in `asks_for`.

    Args:
        momentum: a, the share of the teacher that a step keeps.
        ramp: In step t, counted from 1, a is at most 1 - 1 / t: the first step copies the student.
        average_buffers: Average running statistics too; otherwise they are the student's.
        inference: The teacher is what is clustered, tested and saved.

    Raises:
        ValueError: The momentum is not in [0, 1).
    """

    def __init__(
        self,
        momentum: float = 0.999,
        ramp: bool = True,
        average_buffers: bool = False,
        inference: bool = True,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected 0 <= momentum < 1, got {momentum}")
        self._momentum = momentum
        self._ramp = ramp
        self._average_buffers = average_buffers
        self._inference = inference
        self._teacher: nn.Module | None = None
        self._loaded: Mapping[str, Any] | None = None

    def before_train(self, trainer: Trainer) -> None:
        """Makes the teacher, a copy of the student or as a checkpoint has it."""
        self._teacher = copy.deepcopy(trainer.model).requires_grad_(False).train()
        vars(self._teacher).pop("forward", None)  # a compiled forward pass is the student's
        if self._loaded is not None:
            self._teacher.load_state_dict(self._loaded)
        trainer.networks["teacher"] = self._teacher
        if self._inference:
            trainer.inference_model = self._teacher

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        """Moves the teacher, if the optimizer has taken a step."""
        if trainer.taken is False or self._teacher is None:
            return
        keep = min(self._momentum, 1 - 1 / trainer.step) if self._ramp else self._momentum
        theirs = dict(trainer.model.named_parameters())
        for name, mine in self._teacher.named_parameters():
            self._move(mine, theirs[name], keep, trainer.taken)
        buffers = dict(trainer.model.named_buffers())
        for name, buffer in self._teacher.named_buffers():
            share = keep if self._average_buffers and buffer.is_floating_point() else 0.0
            self._move(buffer, buffers[name], share, trainer.taken)

    @staticmethod
    def _move(
        mine: torch.Tensor, theirs: torch.Tensor, keep: float, taken: bool | torch.Tensor
    ) -> None:
        moved = torch.lerp(theirs, mine, keep) if keep else theirs
        mine.copy_(moved if taken is True else torch.where(torch.as_tensor(taken), moved, mine))

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights."""
        return {} if self._teacher is None else {"teacher": self._teacher.state_dict()}

    def check_state(self, state: Mapping[str, Any], trainer: Trainer, epoch: int) -> None:
        """Checks that the teacher has the model's tensors.

        Raises:
            ValueError: It has others.
        """
        check_tensors(state.get("teacher"), trainer.model.state_dict(), "teacher")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keeps the teacher's weights until training starts."""
        self._loaded = state["teacher"]
