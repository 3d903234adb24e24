"""The optimizer's side of training: precision, accumulation, clipping, rate, undoing steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from reid.engine.nonfinite import BufferCopy
from reid.modeling.classifiers import classifiers_of
from reid.solver import (
    LR_FACTOR,
    LearningRate,
    fit_moments,
    load_optimizer_state,
    start_momentum,
)

Amp = Literal["off", "fp16", "bf16"]
_AMP_DTYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Optimization:
    """Turns losses into gradients and moves the parameters.

    If gradients overflow in fp16, the step is skipped and running statistics are restored as well;
    torch's scaler alone would leave them changed by those batches.

    Args:
        optimizer: Holds the parameters of model and criterion.
        rate: Gives the learning rate of every step.
        device: Where to compute.
        amp: Mixed precision of the forward pass; `fp16` scales the loss.
        accumulation_steps: One optimizer step uses the mean gradient of this many batches. The last
            group of an epoch may be smaller and is averaged over the batches it has.
        clip_grad_norm: Largest norm of the gradient; 0 = no clipping.
        may_skip: Whether `discard` may be called for a batch, so its changes must be undone.
        frozen: Parameters, each with the epoch from which it is trained; see `find_frozen`. Until
            then their gradients are dropped, so they neither move nor decay, and the optimizer's
            state of them starts when they thaw.
        freeze_norms: Whether `set_modes` puts frozen BatchNorms into eval mode.

    Attributes:
        optimizer: The optimizer that was passed in.
        accumulation_steps: The number that was passed in.

    Raises:
        ValueError: `amp` is unknown or a number is out of its range.
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
        frozen: Sequence[tuple[nn.Parameter, float]] = (),
        freeze_norms: bool = False,
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
        self._frozen = tuple(frozen)
        self._freeze_norms = freeze_norms
        self._epoch = 0
        self._before: BufferCopy | None = None

    @property
    def lr(self) -> float:
        """The rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def loss_scale(self) -> float:
        """The factor that `fp16` multiplies the loss by; 1 in other precisions."""
        return float(self._scaler.get_scale())

    def position(self, number: int, count: int) -> tuple[float, bool]:
        """A batch's weight in its accumulation group, and whether the batch ends the group.

        Args:
            number: The batch's index in its epoch, from 0.
            count: Batches in the epoch.
        """
        group = number - number % self.accumulation_steps
        share = 1 / min(self.accumulation_steps, count - group)
        return share, (number + 1) % self.accumulation_steps == 0 or number + 1 == count

    def follow_refills(self, module: nn.Module) -> None:
        """Fits the moments of classifiers over clusters that were refilled since the last call.

        Args:
            module: Holds the classifiers; see `ClusterClassifier`.
        """
        for _, part in classifiers_of(module):
            if part.refilled:
                fit_moments(self.optimizer, part.weight, keep=part.moments == "keep")
                part.refilled = False

    def set_modes(self, model: nn.Module, epoch: int) -> None:
        """Puts a model into training mode, and its frozen BatchNorms into eval mode if wanted.

        Args:
            model: With all its modules.
            epoch: From 0; see `begin`.
        """
        model.train()
        if not self._freeze_norms:
            return
        frozen = {id(parameter) for parameter, until in self._frozen if epoch < until}
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                parameters = list(module.parameters())
                if parameters and all(
                    id(parameter) in frozen or not parameter.requires_grad
                    for parameter in parameters
                ):
                    module.eval()

    def begin(self, model: nn.Module, epoch: int, step: int) -> None:
        """Prepares for a batch: sets the rate, and copies running statistics that may be restored.

        Args:
            model: Its buffers are copied at the first batch of an accumulation group.
            epoch: The batch's epoch, from 0.
            step: Batches that the whole run has seen before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(epoch, step, group.get(LR_FACTOR, 1.0))
        self._epoch = epoch
        if self._may_undo and self._before is None:
            self._before = BufferCopy(model)

    def autocast(self) -> torch.autocast:
        """The context in which the forward pass runs, for its precision."""
        return torch.autocast(
            self._device_type, self._dtype, enabled=self._dtype is not torch.float32
        )

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss; the caller weights it by its share of the group."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor | None:
        """Takes a step with the accumulated gradients, and clears them.

        Returns:
            With fp16, a () bool on the device, which alone knows the result: false if gradients
            overflowed and no step was taken. Otherwise None: the step was taken.
        """
        # Not by requires_grad: DistributedDataParallel and compiled networks fix that at the start.
        for parameter, until in self._frozen:
            if self._epoch < until:
                parameter.grad = None
        if self._clip_grad_norm:
            self._scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._clip_grad_norm)
        start_momentum(self.optimizer)
        self._scaler.step(self.optimizer)
        taken = None
        if self._scaler.is_enabled():
            assert self._before is not None
            # Every process has the same gradients, so all of them decide alike.
            (overflow,) = self._scaler._found_inf_per_device(self.optimizer).values()
            taken = overflow == 0
            self._before.restore(~taken)
        self._scaler.update()
        self.optimizer.zero_grad()
        self._before = None
        return taken

    def discard(self) -> None:
        """Clears the accumulated gradients and restores running statistics."""
        self.optimizer.zero_grad()
        if self._before is not None:
            self._before.restore()
            self._before = None

    def state_dict(self) -> dict[str, Any]:
        """The state of optimizer and scaler."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; settings such as weight decay stay as built.

        Raises:
            ValueError: The parameter groups differ.
        """
        load_optimizer_state(self.optimizer, state["optimizer"])
        if state["scaler"]:  # else the run had no fp16, and the scale starts anew
            self._scaler.load_state_dict(state["scaler"])
