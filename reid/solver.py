"""The optimizer, from torch.optim, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

LR_FACTOR = "lr_factor"
"""Key of a parameter group: its learning rate as a multiple of the base rate; 1 if missing."""
_NO_FACTORS: Mapping[str, float] = MappingProxyType({})


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    name: Literal["SGD", "Adam", "AdamW"],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    bias_lr_factor: float = 1.0,
    nesterov: bool = False,
    lr_factors: Mapping[str, float] = _NO_FACTORS,
) -> Optimizer:
    """An optimizer over the parameters that are trained, weight decay on every one of them.

    torch's fused optimizers take a step in one pass over the parameters; their numbers equal the
    plain ones' up to rounding. SGD's momentum starts as zeros here: torch would allocate it in the
    first step, and leave it uninitialised if that step overflows in fp16.

    Args:
        parameters: With their names; without factors of the learning rate, names may be missing.
        name: `SGD`, `Adam` or `AdamW`.
        lr: Learning rate.
        momentum: SGD's momentum.
        weight_decay: On every parameter, biases and norms included.
        bias_lr_factor: Factor of the learning rate of every parameter with `bias` in its name.
        nesterov: SGD with Nesterov's momentum.
        lr_factors: Factors of the learning rate by the start of a parameter's name, in small
            letters: `backbone` holds for `backbone.net.conv1.weight`. The longest one counts.
            Parameters with the same factor are a group; those with the factor 1 come first.

    Raises:
        ValueError: The name is unknown, there is no parameter to train, names are missing, or no
            name starts as `lr_factors` says.
    """
    by_factor: dict[float, list[nn.Parameter]] = {}
    unused = set(lr_factors)
    for item in parameters:
        key, parameter = item if isinstance(item, tuple) else ("", item)
        if bias_lr_factor != 1 and not key:
            raise ValueError("bias_lr_factor: other than 1 needs the parameters' names")
        if lr_factors and not key:
            raise ValueError("lr_factors: needs the parameters' names")
        starts = [start for start in lr_factors if f"{key}.".lower().startswith(f"{start}.")]
        unused -= set(starts)
        factor = lr_factors[max(starts, key=len)] if starts else 1.0
        if "bias" in key:
            factor *= bias_lr_factor
        if parameter.requires_grad:
            by_factor.setdefault(factor, []).append(parameter)
    if unused:
        raise ValueError(f"lr_factors: no parameter's name starts with {', '.join(sorted(unused))}")
    if not by_factor:
        raise ValueError("optimizer: there is no parameter to train: all are frozen")
    groups: list[dict[str, Any]] = [
        {"params": group}
        if factor == 1
        else {"params": group, "lr": factor * lr, LR_FACTOR: factor}
        for factor, group in sorted(by_factor.items(), key=lambda item: item[0] != 1)
    ]
    if name == "SGD":
        sgd = SGD(
            groups,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            fused=True,
        )
        if momentum:
            for group in groups:
                for parameter in group["params"]:
                    sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if name == "Adam":
        return Adam(groups, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "AdamW":
        return AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    raise ValueError(f"optimizer: expected SGD, Adam or AdamW, got {name!r}")


def find_frozen(
    parameters: Iterable[tuple[str, nn.Parameter]], frozen: Mapping[str, int | Literal["always"]]
) -> list[tuple[nn.Parameter, float]]:
    """The parameters that do not move at first, each with the epoch from which it is trained.

    Args:
        parameters: With their names.
        frozen: The epoch, from 0, or `always`, by the start of a parameter's name, in small
            letters. The longest start counts, so that 0 makes an exception.

    Returns:
        Pairs of a parameter and an epoch; infinity for `always`.

    Raises:
        ValueError: No name starts as `frozen` says, or no parameter is left to train in epoch 0.
    """
    unused = set(frozen)
    found: list[tuple[nn.Parameter, float]] = []
    is_trained = False
    for key, parameter in parameters:
        starts = [start for start in frozen if f"{key}.".lower().startswith(f"{start}.")]
        unused -= set(starts)
        until = frozen[max(starts, key=len)] if starts else 0
        if until and parameter.requires_grad:
            found.append((parameter, until if isinstance(until, int) else math.inf))
        is_trained = is_trained or (parameter.requires_grad and not until)
    if unused:
        raise ValueError(f"frozen: no parameter's name starts with {', '.join(sorted(unused))}")
    if found and not is_trained:
        raise ValueError("frozen: no parameter is left to train in the first epoch")
    return found


def start_momentum(optimizer: Optimizer) -> None:
    """Gives parameters that were frozen until now a momentum of 0.

    torch's fused SGD fails if, in one step, some parameters have a momentum and others none.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        late = [p for p in trained if optimizer.state[p].get("momentum_buffer") is None]
        if group["momentum"] and 0 < len(late) < len(trained):
            for parameter in late:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@torch.no_grad()
def fit_moments(optimizer: Optimizer, parameter: nn.Parameter, *, keep: bool) -> None:
    """Fits the moments of a parameter whose rows were replaced, and may be more or fewer now.

    Args:
        optimizer: Trains the parameter.
        parameter: (C, ...).
        keep: The moments of row i stay with row i, and those of new rows are 0; the number of steps
            stays. Otherwise the state of the parameter is that of a new optimizer.
    """
    before = optimizer.state.pop(parameter, {})
    state: dict[str, Any] = {}
    for name, value in before.items():
        if not isinstance(value, torch.Tensor) or not value.ndim:
            if keep:
                state[name] = value
        elif keep or isinstance(optimizer, SGD):  # SGD's momentum starts as zeros
            state[name] = fitted = torch.zeros_like(parameter)
            if keep:
                rows = min(len(value), len(fitted))
                fitted[:rows] = value[:rows]
    if state:
        optimizer.state[parameter] = state


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restores a state, except learning rate, weight decay and the like, which stay as built.

    Args:
        optimizer: Fresh from `build_optimizer`.
        state: Of an optimizer with the same groups of parameters.

    Raises:
        ValueError: The groups differ.
    """
    # torch looks at `fused` of the loaded groups to place the state: so these must be as built.
    groups = [
        {**built, "params": stored["params"]}
        for stored, built in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    # Fused kernels take moments for laid out like their parameters; a file may have them otherwise.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _laid_out_like(parameters[number], value) for name, value in own.items()}
        for number, own in state["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _laid_out_like(parameter: torch.Tensor, value: Any) -> Any:
    """A copy of a moment with its elements in the parameter's order; else the value itself."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, device=value.device).copy_(value)


def warmup_factor(step: int, steps: int, start: float) -> float:
    """Share of the learning rate in a linear warm-up: `start` in step 0, 1 from `steps` on.

    A step is an epoch or an iteration.
    """
    if step >= steps:
        return 1.0
    progress = step / steps
    return start * (1 - progress) + progress


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of every step, a function of epoch and step alone.

    Linear warm-up by epochs, then `multistep`, `cosine` or `exponential` by epochs; and, as
    fast-reid has it, a linear warm-up by iterations on top.

    Attributes:
        base: Rate after the warm-up.
        max_epochs: Epochs in all.
        schedule: What follows the warm-up. `multistep`: falls by `gamma` at each milestone.
            `cosine`: half a cosine to `final_factor` (SGDR, arXiv:1608.03983). `exponential`:
            from the first milestone on, falls by the same factor in each epoch, so that it would be
            at `final_factor` after the last one.
        milestones: Epochs, from 0, at which `multistep` multiplies the rate by `gamma`.
        gamma: See `milestones`.
        final_factor: Where `cosine` and `exponential` end, as a share of the base rate; with
            `cosine`, groups with another rate end there too.
        cosine_after_warmup: The cosine starts at the end of the warm-up; otherwise in epoch 0,
            the warm-up covering its beginning (TransReID).
        warmup_epochs: Epochs of warm-up.
        warmup_iterations: Iterations of warm-up, on top.
        warmup_start: Where the warm-ups start, as a share of the base rate, in every group.
        offset: Epochs by which the schedule is ahead: epoch e has the rate that e + offset would
            have. 1 in TransReID, whose first epoch is past the start of the warm-up and whose last
            one has the final rate.

    Raises:
        ValueError: The schedule is unknown.
    """

    base: float
    max_epochs: int
    schedule: Literal["multistep", "cosine", "exponential"] = "multistep"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    final_factor: float = 0.0
    cosine_after_warmup: bool = True
    warmup_epochs: int = 0
    warmup_iterations: int = 0
    warmup_start: float = 0.01
    offset: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in ("multistep", "cosine", "exponential"):
            raise ValueError(
                f"schedule: expected multistep, cosine or exponential, got {self.schedule!r}"
            )
        if self.schedule == "exponential" and not (self.milestones and self.final_factor > 0):
            raise ValueError(
                "schedule: exponential needs a milestone where the rate begins to fall, and "
                f"final_factor above 0; got {self.milestones} and {self.final_factor}"
            )

    def __call__(self, epoch: int, step: int = 0, lr_factor: float = 1.0) -> float:
        """The rate of a step.

        Args:
            epoch: Of the step, from 0.
            step: Number of steps that the run took before it.
            lr_factor: Of the parameter group; see `LR_FACTOR`.
        """
        start = self.warmup_start / lr_factor
        rate = lr_factor * self.base * self._epoch_factor(epoch + self.offset, lr_factor, start)
        if self.warmup_iterations:
            rate *= warmup_factor(step, self.warmup_iterations, start)
        return rate

    def _epoch_factor(self, epoch: int, lr_factor: float, start: float) -> float:
        warming = warmup_factor(epoch, self.warmup_epochs, start)
        if self.schedule == "multistep":
            return warming * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "exponential":
            fall = self.milestones[0]
            share = (epoch - fall) / max(1, self.max_epochs - fall)
            return warming * float(self.final_factor ** min(1.0, max(0.0, share)))
        if epoch < self.warmup_epochs:
            return warming
        first = self.warmup_epochs if self.cosine_after_warmup else 0
        progress = (epoch - first) / max(1, self.max_epochs - first)
        final = self.final_factor / lr_factor
        angle = math.pi * min(1.0, max(0.0, progress))
        return warming * (final + (1 - final) * (1 + math.cos(angle)) / 2)
