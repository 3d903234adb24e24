"""The optimizer and the schedule, from torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    name: Literal["SGD", "Adam", "AdamW"],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> Optimizer:
    """An optimizer over the parameters that are trained, weight decay on every one of them.

    Raises:
        ValueError: The name is unknown, or there is no parameter to train.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("there is no parameter to train: all are frozen")
    if name == "SGD":
        return SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "Adam":
        return Adam(trained, lr=lr, weight_decay=weight_decay)
    if name == "AdamW":
        return AdamW(trained, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"optimizer: expected SGD, Adam or AdamW, got {name!r}")


def warmup_factor(epoch: int, warmup_epochs: int, start: float) -> float:
    """Share of the learning rate in the linear warm-up: `start` in epoch 0, 1 after the warm-up."""
    if epoch >= warmup_epochs:
        return 1.0
    progress = epoch / warmup_epochs
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
    warmup_epochs: int = 0,
    warmup_start: float = 0.01,
) -> LambdaLR:
    """A schedule that is stepped once an epoch: linear warm-up, then `multistep` or `cosine`.

    Raises:
        ValueError: The name is unknown.
    """
    if name == "multistep":
        main = multistep(milestones, gamma)
    elif name == "cosine":
        main = cosine(warmup_epochs, max_epochs, final_lr_factor)
    else:
        raise ValueError(f"schedule: expected multistep or cosine, got {name!r}")
    return LambdaLR(
        optimizer, lambda epoch: warmup_factor(epoch, warmup_epochs, warmup_start) * main(epoch)
    )
