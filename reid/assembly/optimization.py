"""Builds the optimizer and the learning rate of a config."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from reid.config import Config, SolverConfig
from reid.engine.optimization import Optimization
from reid.modeling.losses import Criterion
from reid.registry import ConfigError
from reid.solver import LearningRate, build_optimizer, find_frozen


def build_learning_rate(solver: SolverConfig) -> LearningRate:
    """Builds the learning rate, a function of epoch and step."""
    return LearningRate(
        solver.base_lr,
        solver.max_epochs,
        solver.schedule,
        tuple(solver.milestones),
        solver.gamma,
        solver.final_lr_factor,
        solver.cosine_after_warmup,
        solver.warmup_epochs,
        solver.warmup_iterations,
        solver.warmup_factor,
        solver.schedule_offset,
    )


def build_optimization(
    config: Config,
    model: nn.Module,
    criterion: Criterion,
    device: torch.device,
    more_students: Mapping[str, nn.Module] | None = None,
) -> Optimization:
    """Builds optimizer, learning rate, precision, accumulation and clipping.

    `more_students` are trained beside the model. `lr_factors` know their parameters by the names
    that the model's have.

    Raises:
        ConfigError: There is no parameter to train, or `lr_factors` or `frozen` names none.
    """
    solver = config.solver
    students = (model, *(more_students or {}).values())
    parameters = [pair for student in students for pair in student.named_parameters()]
    parameters += criterion.named_parameters()
    try:
        optimizer = build_optimizer(
            parameters,
            solver.optimizer,
            lr=solver.base_lr,
            momentum=solver.momentum,
            weight_decay=solver.weight_decay,
            bias_lr_factor=solver.bias_lr_factor,
            nesterov=solver.nesterov,
            lr_factors=solver.lr_factors,
        )
        frozen = find_frozen(parameters, solver.frozen)
    except ValueError as error:
        raise ConfigError(f"solver.{error}") from error
    return Optimization(
        optimizer,
        build_learning_rate(solver),
        device,
        amp=solver.amp,
        accumulation_steps=solver.accumulation_steps,
        clip_grad_norm=solver.clip_grad_norm,
        may_skip=solver.on_nonfinite == "skip",
        frozen=frozen,
        freeze_norms=solver.frozen_norms == "eval",
    )
