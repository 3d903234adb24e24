"""Parameters that are frozen for ever or until an epoch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from reid.assembly.optimization import build_optimization
from reid.config import Config, SolverConfig
from reid.engine.optimization import Optimization
from reid.modeling.losses import Criterion, Loss
from reid.registry import ConfigError
from reid.solver import find_frozen

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
        self.head = nn.Linear(3, 2)


def make(**solver: object) -> tuple[Net, Optimization]:
    net = Net()
    config = Config(solver=SolverConfig(warmup_epochs=0, base_lr=0.1, **solver))  # type: ignore[arg-type]
    return net, build_optimization(config, net, Criterion([Loss()]), CPU)


def step(net: Net, optimization: Optimization, epoch: int) -> set[str]:
    """One step; gives the names of the parameters that moved."""
    before = copy.deepcopy(net.state_dict())
    optimization.begin(net, epoch, epoch)
    with optimization.autocast():
        x = torch.ones(2, 3)
        for layer in (*net.backbone.values(), net.head):
            x = layer(x)
        loss = x.float().square().sum()
    optimization.backward(loss)
    optimization.step()
    return {name for name, value in net.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_frozen_parameters_neither_move_nor_decay_until_their_epoch(
    optimizer: str, clip: float
) -> None:
    net, optimization = make(
        optimizer=optimizer,
        weight_decay=0.1,
        clip_grad_norm=clip,
        frozen={"backbone": 2, "backbone.first": "always", "backbone.second.bias": 0},
    )
    head, second = {"head.weight", "head.bias"}, {"backbone.second.bias"}
    assert step(net, optimization, 0) == head | second
    assert step(net, optimization, 1) == head | second
    assert step(net, optimization, 2) == head | second | {"backbone.second.weight"}
    assert step(net, optimization, 50) == head | second | {"backbone.second.weight"}


def test_frozen_norms_take_their_running_statistics() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False))
    frozen = {"0": 2, "1.weight": "always"}
    for norms, expected in (("eval", [False, True, True]), ("train", [True, True, True])):
        solver = SolverConfig(warmup_epochs=0, frozen=frozen, frozen_norms=norms)  # type: ignore[arg-type]
        optimization = build_optimization(Config(solver=solver), net, Criterion([Loss()]), CPU)
        optimization.set_modes(net.eval(), 1)
        assert [norm.training for norm in net] == expected
        optimization.set_modes(net, 2)
        assert all(norm.training for norm in net)


def test_the_gradient_of_frozen_parameters_is_not_clipped_with_the_others() -> None:
    free, one = make(clip_grad_norm=0.5, frozen={"backbone": "always"})
    alone, other = make(clip_grad_norm=0.5)
    alone.backbone.requires_grad_(False)
    step(free, one, 0)
    step(alone, other, 0)
    assert free.head.weight.equal(alone.head.weight)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_run_resumes_before_and_after_the_thaw_with_the_same_bits(optimizer: str) -> None:
    whole, optimization = make(optimizer=optimizer, frozen={"backbone": 2})
    states = []
    for epoch in range(4):
        states.append(copy.deepcopy((whole.state_dict(), optimization.state_dict())))
        step(whole, optimization, epoch)
    for start, (weights, state) in enumerate(states):
        net, again = make(optimizer=optimizer, frozen={"backbone": 2})
        net.load_state_dict(weights)
        again.load_state_dict(state)
        for epoch in range(start, 4):
            step(net, again, epoch)
        assert all(a.equal(b) for a, b in zip(net.parameters(), whole.parameters(), strict=True))


def test_names_are_found_by_their_whole_words_and_own_frozen_ones_stay() -> None:
    net = Net()
    net.backbone["first"].bias.requires_grad_(False)
    found = find_frozen(net.named_parameters(), {"backbone.first": "always"})
    assert [(parameter is net.backbone["first"].weight, until) for parameter, until in found] == [
        (True, math.inf)
    ]


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({"backbone.fir": 3}, "solver.frozen: no parameter's name starts with backbone.fir"),
        ({"backbone": 1, "head": "always"}, "no parameter is left to train in the first epoch"),
    ],
)
def test_wrong_names_and_a_frozen_network_are_errors(
    frozen: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(frozen=frozen)


@pytest.mark.parametrize("value", [-1, 1.5, "forever", None])
def test_another_value_is_an_error(value: object) -> None:
    with pytest.raises(ConfigError, match=r"solver\.frozen\.head: expected"):
        SolverConfig(frozen={"head": value})  # type: ignore[dict-item]
