"""The optimizer's side of training: precision, accumulation, clipping, rate, and steps undone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reid.engine.nonfinite import BufferCopy
from reid.solver import LR_FACTOR, LearningRate, load_optimizer_state, start_momentum

Amp = Literal["off", "fp16", "bf16"]
_AMP_DTYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Optimization:
    """From losses to parameters that have moved.

    A step whose gradients overflow in fp16 is left out and leaves no trace: running statistics go
    back to what they were with the weights, while torch alone would keep those of such batches.

    Args:
        optimizer: Over the parameters of model and criterion.
        rate: Of every step.
        device: Where to compute.
        amp: Mixed precision of the forward pass; `fp16` scales the loss.
        accumulation_steps: Batches whose mean gradient makes one optimizer step. The last group
            of an epoch may be smaller, and is averaged over the batches it has.
        clip_grad_norm: Largest norm of the gradient; 0 = no clipping.
        may_skip: Whether steps may be undone for other reasons than an overflow.

    Attributes:
        optimizer: As given.
        accumulation_steps: As given.

    Raises:
        ValueError: A number or a word is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rate: LearningRate,
        device: torch.device,
        *,
        amp: Amp = "off",
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        may_skip: bool = False,
    ) -> None:
        if amp not in _AMP_DTYPES:
            raise ValueError(f"amp: expected one of {', '.join(_AMP_DTYPES)}, got {amp!r}")
        if accumulation_steps < 1 or clip_grad_norm < 0:
            raise ValueError(
                "expected accumulation_steps >= 1 and clip_grad_norm >= 0, got "
                f"{accumulation_steps}, {clip_grad_norm}"
            )
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self._rate = rate
        self._device_type = device.type
        self._dtype = _AMP_DTYPES[amp]
        self._scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self._clip_grad_norm = clip_grad_norm
        self._may_undo = may_skip or amp == "fp16"
        self._before: BufferCopy | None = None

    @property
    def lr(self) -> float:
        """The rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def loss_scale(self) -> float:
        """What `fp16` multiplies the loss by; 1 without it."""
        return float(self._scaler.get_scale())

    def position(self, number: int, count: int) -> tuple[float, bool]:
        """A batch's weight in its accumulation group, and whether it ends the group.

        Args:
            number: Of the batch in its epoch, from 0.
            count: Batches in the epoch.
        """
        group = number - number % self.accumulation_steps
        share = 1 / min(self.accumulation_steps, count - group)
        return share, (number + 1) % self.accumulation_steps == 0 or number + 1 == count

    def begin(self, model: nn.Module, epoch: int, step: int) -> None:
        """Before a batch: sets the rate, and remembers running statistics that may go back.

        Args:
            model: Its buffers are remembered, at the first batch of an accumulation group.
            epoch: Of the batch, from 0.
            step: Batches of the whole run before it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(epoch, step, group.get(LR_FACTOR, 1.0))
        if self._may_undo and self._before is None:
            self._before = BufferCopy(model)

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(
            self._device_type, self._dtype, enabled=self._dtype is not torch.float32
        )

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, weighted by its share of the accumulation group."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor | None:
        """Takes a step with the gradients that were added up, and forgets them.

        Returns:
            () bool on the device, false where the gradients overflowed and no step was taken; only
            the device knows. None: the step was taken.
        """
        if self._clip_grad_norm:
            self._scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._clip_grad_norm)
        start_momentum(self.optimizer)
        self._scaler.step(self.optimizer)
        taken = None
        if self._scaler.is_enabled():
            assert self._before is not None
            # Gradients are the same in every process, so all of them decide alike.
            (overflow,) = self._scaler._found_inf_per_device(self.optimizer).values()
            taken = overflow == 0
            self._before.restore(~taken)
        self._scaler.update()
        self.optimizer.zero_grad()
        self._before = None
        return taken

    def discard(self) -> None:
        """Forgets the gradients that were added up; running statistics go back."""
        self.optimizer.zero_grad()
        if self._before is not None:
            self._before.restore()
            self._before = None

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer and scaler."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; rate, weight decay and the like stay as built.

        Raises:
            ValueError: The parameter groups are others.
        """
        load_optimizer_state(self.optimizer, state["optimizer"])
        if state["scaler"]:  # else the run had no fp16, and the scale starts anew
            self._scaler.load_state_dict(state["scaler"])
