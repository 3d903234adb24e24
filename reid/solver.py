"""The optimizer and the schedule, from torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

LR_FACTOR = "lr_factor"
"""Key of a parameter group: its learning rate as a multiple of the base rate; 1 if not there."""


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    name: Literal["SGD", "Adam", "AdamW"],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    bias_lr_factor: float = 1.0,
) -> Optimizer:
    """An optimizer over the parameters that are trained, weight decay on every one of them.

    It is torch's fused one, which takes a step in one pass over the parameters. Its numbers are the
    plain one's but for rounding. SGD's momentum starts as zeros: torch would make room for it in
    the first step, and leave what lies there as it is if that step overflows in fp16.

    Args:
        parameters: With their names, or alone where `bias_lr_factor` is 1.
        name: Of the optimizer.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: On every parameter, biases and norms included.
        bias_lr_factor: Factor of the learning rate of every parameter with `bias` in its name;
            these make a second group.

    Raises:
        ValueError: The name is unknown, there is no parameter to train, or names are missing.
    """
    weights: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for item in parameters:
        key, parameter = item if isinstance(item, tuple) else ("", item)
        if bias_lr_factor != 1 and not key:
            raise ValueError("bias_lr_factor: other than 1 needs the parameters' names")
        if parameter.requires_grad:
            (biases if bias_lr_factor != 1 and "bias" in key else weights).append(parameter)
    if not weights and not biases:
        raise ValueError("there is no parameter to train: all are frozen")
    groups: list[dict[str, Any]] = [{"params": weights}] if weights else []
    if biases:
        groups.append({"params": biases, "lr": bias_lr_factor * lr, LR_FACTOR: bias_lr_factor})
    if name == "SGD":
        sgd = SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        if momentum:
            for parameter in (*weights, *biases):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if name == "Adam":
        return Adam(groups, lr=lr, weight_decay=weight_decay, fused=True)
    if name == "AdamW":
        return AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    raise ValueError(f"optimizer: expected SGD, Adam or AdamW, got {name!r}")


def warmup_factor(step: int, steps: int, start: float) -> float:
    """Share of the learning rate in a linear warm-up: `start` in step 0, 1 from `steps` on.

    A step is an epoch or an iteration.
    """
    if step >= steps:
        return 1.0
    progress = step / steps
    return start * (1 - progress) + progress


def multistep(milestones: Sequence[int], gamma: float) -> Callable[[int], float]:
    """The rate falls by `gamma` at each milestone (epochs, from 0)."""
    return lambda epoch: gamma ** sum(epoch >= milestone for milestone in milestones)


def cosine(first_epoch: int, max_epochs: int, final: float) -> Callable[[int], float]:
    """Half a cosine from 1 at `first_epoch` to `final` at `max_epochs` (SGDR, arXiv:1608.03983)."""

    def factor(epoch: int) -> float:
        progress = (epoch - first_epoch) / max(1, max_epochs - first_epoch)
        return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2

    return factor


def build_scheduler(
    optimizer: Optimizer,
    name: Literal["multistep", "cosine"],
    *,
    max_epochs: int,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    final_lr_factor: float = 0.0,
    cosine_after_warmup: bool = True,
    warmup_epochs: int = 0,
    warmup_start: float = 0.01,
) -> LambdaLR:
    """A schedule that is stepped once an epoch: linear warm-up, then `multistep` or `cosine`.

    Args:
        optimizer: Each parameter group has a schedule of its own.
        name: What follows the warm-up.
        max_epochs: Epochs in all.
        milestones: Epochs at which `multistep` multiplies the rate by `gamma`.
        gamma: See `milestones`.
        final_lr_factor: Where `cosine` ends, as a share of the base rate; groups with another
            rate end there too.
        cosine_after_warmup: The cosine starts at the end of the warm-up; otherwise in epoch 0,
            the warm-up covering its beginning (TransReID).
        warmup_epochs: Epochs of warm-up.
        warmup_start: Where the warm-up starts, as a share of the base rate, in every group.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in ("multistep", "cosine"):
        raise ValueError(f"schedule: expected multistep or cosine, got {name!r}")

    def schedule(lr_factor: float) -> Callable[[int], float]:
        main = (
            multistep(milestones, gamma)
            if name == "multistep"
            else cosine(
                warmup_epochs if cosine_after_warmup else 0, max_epochs, final_lr_factor / lr_factor
            )
        )

        def factor(epoch: int) -> float:
            warming = warmup_factor(epoch, warmup_epochs, warmup_start / lr_factor)
            return warming if name == "cosine" and epoch < warmup_epochs else warming * main(epoch)

        return factor

    return LambdaLR(
        optimizer, [schedule(group.get(LR_FACTOR, 1.0)) for group in optimizer.param_groups]
    )


def load_state(
    optimizer: Optimizer,
    scheduler: LRScheduler,
    optimizer_state: Mapping[str, Any],
    scheduler_state: Mapping[str, Any],
) -> None:
    """Takes states back; learning rate, weight decay and the like stay those as built.

    Args:
        optimizer: Fresh from `build_optimizer`.
        scheduler: Of this optimizer, fresh too.
        optimizer_state: Of an optimizer with the same groups of parameters.
        scheduler_state: Of its schedule. That of a `LambdaLR` goes on with the rates as built,
            any other one with the rates that it had.

    Raises:
        ValueError: The groups are others.
    """
    built_with = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    base_lrs = list(scheduler.base_lrs)
    # With the groups as built, since the state goes where a fused optimizer wants it.
    groups = [
        {**group, **options}
        for group, options in zip(optimizer_state["param_groups"], built_with, strict=True)
    ]
    optimizer.load_state_dict({**optimizer_state, "param_groups": groups})
    scheduler.load_state_dict(dict(scheduler_state))
    if isinstance(scheduler, LambdaLR):  # its rates do not depend on those before
        scheduler.base_lrs = base_lrs
        epoch = scheduler.last_epoch
        rates = [
            base_lr * factor(epoch)
            for base_lr, factor in zip(base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
