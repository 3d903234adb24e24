from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from reid.checking import ConfigError
from reid.config import SolverConfig
from reid.solver import LearningRate, build_optimizer, start_momentum


def rates(epochs, lr=1.0, bias_lr_factor=1.0, **options):
    """(epochs,) of one group, (epochs, 2) with the biases' group."""
    rate = LearningRate(lr, epochs, **options)
    factors = [1.0] if bias_lr_factor == 1 else [1.0, bias_lr_factor]
    table = np.array([[rate(epoch, lr_factor=factor) for factor in factors]
                      for epoch in range(epochs)])  # fmt: skip
    return table.squeeze(1) if len(factors) == 1 else table


def test_an_overflow_in_the_first_step_leaves_no_rubbish_in_the_momentum():
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(layer.parameters(), "SGD", lr=1.0, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    # Fills uninitialised memory with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        for factor in (torch.inf, 1.0):
            scaler.scale(factor * layer(torch.ones(1, 2)).sum()).backward()
            before = layer.bias.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(layer.bias.detach(), before - 1)


@pytest.mark.oracle
def test_every_epochs_rate_is_the_authors(oracle_dir):
    files = sorted(oracle_dir.glob("schedule*.npz"))
    assert files
    for file in files:
        data = np.load(file)
        expected = data["lr_by_epoch"]
        found = rates(
            len(expected),
            schedule="multistep",
            lr=float(data["base_lr"]),
            milestones=tuple(data["milestones"].tolist()),
            gamma=float(data["gamma"]),
            warmup_epochs=int(data["warmup_epochs"]),
            warmup_start=float(data["warmup_factor"]),
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_warmup_and_milestones():
    found = rates(6, schedule="multistep", milestones=(4,), warmup_epochs=2, warmup_start=0.5)
    np.testing.assert_allclose(found, [0.5, 0.75, 1, 1, 0.1, 0.1])


def test_exponential_falls_from_its_milestone_to_the_final_rate():
    found = rates(6, schedule="exponential", milestones=(2,), final_factor=0.0001)
    assert found == pytest.approx([1, 1, 1, 0.1, 0.01, 0.001])
    for options in ({"final_factor": 0.1}, {"milestones": (2,)}):
        with pytest.raises(ValueError, match="exponential needs a milestone"):
            rates(6, schedule="exponential", **options)
    message = "solver.schedule: exponential needs a milestone"
    with pytest.raises(ConfigError, match=message):
        SolverConfig(schedule="exponential", final_lr_factor=0.1, milestones=[])


def test_cosine_starts_after_the_warmup_and_ends_at_the_final_rate():
    found = rates(6, schedule="cosine", warmup_epochs=2, warmup_start=0.0, final_factor=0.1)
    expected = [0, 0.5, 1] + [0.1 + 0.45 * (1 + np.cos(np.pi * t / 4)) for t in (1, 2, 3)]
    np.testing.assert_allclose(found, expected)


TRANSREID = {"schedule": "cosine", "final_factor": 0.002, "cosine_after_warmup": False,
             "warmup_epochs": 20, "warmup_start": 0.01}  # fmt: skip


def test_schedule_of_transreid():
    """Epochs counted from 1, in units of the base rate; biases have twice the rate."""
    for lr in (1.0, 4e-4, 8e-3):
        weights, biases = rates(120, lr=lr, bias_lr_factor=2.0, **TRANSREID).T / lr
        published = {1: 0.01, 2: 0.0595, 20: 0.9505, 21: 0.933147, 61: 0.501, 120: 0.002171}
        for epoch, rate in published.items():
            assert weights[epoch - 1] == pytest.approx(rate, abs=5e-7)
        for epoch, rate in {1: 0.01, 2: 0.1095, 21: 1.866159}.items():
            assert biases[epoch - 1] == pytest.approx(rate, abs=5e-7)
        t = np.arange(20, 120)
        by_hand = 0.002 + (2 - 0.002) * (1 + np.cos(np.pi * t / 120)) / 2
        np.testing.assert_allclose(biases[20:], by_hand, rtol=1e-12)
    five = rates(120, **(TRANSREID | {"warmup_epochs": 5}))  # the ImageNet baseline
    np.testing.assert_allclose(five[[0, 4, 5]], [0.01, 0.802, 0.002 + 0.499 * (
        1 + np.cos(np.pi * 5 / 120))])  # fmt: skip


def test_schedule_of_bots_paper():
    found = rates(120, schedule="multistep", lr=3.5e-4, milestones=(40, 70), warmup_epochs=10,
                  warmup_start=0.1)  # fmt: skip
    np.testing.assert_allclose(
        found[[0, 9, 10, 39, 40, 69, 70, 119]],
        [3.5e-5, 3.185e-4, *[3.5e-4] * 2, *[3.5e-5] * 2, *[3.5e-6] * 2],
    )


def test_warmup_by_iterations_lies_over_the_epochs():
    rate = LearningRate(2.0, 3, milestones=(1,), warmup_iterations=4, warmup_start=0.5)
    table = [rate(step // 3, step) for step in range(6)]
    np.testing.assert_allclose(table, [1, 1.25, 1.5, 0.175, 0.2, 0.2])
    assert rate(0, 0, lr_factor=2.0) == 1.0  # all groups start at the same rate


def test_biases_have_their_own_rate():
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    layer[1].bias.requires_grad_(False)
    optimizer = build_optimizer(
        layer.named_parameters(), "Adam", lr=0.1, weight_decay=1e-4, bias_lr_factor=2.0
    )
    weights, biases = optimizer.param_groups
    assert weights["params"] == [layer[0].weight, layer[1].weight]
    assert biases["params"] == [layer[0].bias]
    assert (weights["lr"], biases["lr"]) == (0.1, 0.2)
    assert weights["weight_decay"] == biases["weight_decay"] == 1e-4
    with pytest.raises(ValueError, match="bias_lr_factor: other than 1 needs the parameters' name"):
        build_optimizer(layer.parameters(), "SGD", lr=0.1, bias_lr_factor=2.0)


def test_rates_by_the_start_of_the_name():
    net = nn.ModuleDict({
        "backbone": nn.Linear(2, 2), "head": nn.ModuleDict({"neck": nn.LayerNorm(2)}),
        "headline": nn.Linear(2, 2, bias=False),
    })  # fmt: skip
    optimizer = build_optimizer(
        net.named_parameters(), "SGD", lr=0.1, nesterov=True, bias_lr_factor=2.0,
        lr_factors={"backbone": 0.1, "head": 3.0, "head.neck": 0.5},
    )  # fmt: skip
    groups = {group.get("lr_factor", 1.0): group for group in optimizer.param_groups}
    assert [*groups] == [1.0, 0.1, 0.2, 0.5]
    neck = net["head"]["neck"]
    assert groups[1.0]["params"] == [neck.bias, net["headline"].weight]  # 0.5 * 2, and none
    assert groups[0.1]["params"] == [net["backbone"].weight]
    assert groups[0.2]["params"] == [net["backbone"].bias]
    assert groups[0.5]["params"] == [neck.weight]
    assert groups[0.2]["lr"] == pytest.approx(0.02)
    assert all(group["nesterov"] for group in groups.values())
    with pytest.raises(ValueError, match="lr_factors: no parameter's name starts with back, neck"):
        build_optimizer(net.named_parameters(), "SGD", lr=1, lr_factors={"back": 1, "neck": 1})
    with pytest.raises(ValueError, match="lr_factors: needs the parameters' names"):
        build_optimizer(net.parameters(), "SGD", lr=1, lr_factors={"backbone": 0.1})


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_weight_decay_is_on_every_trained_parameter(name):
    layer = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.BatchNorm1d(2))
    layer[2].bias.requires_grad_(False)
    optimizer = build_optimizer(layer.parameters(), name, lr=0.1, weight_decay=5e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4]
    assert len(optimizer.param_groups[0]["params"]) == 5


def test_what_is_wrong_is_named():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="optimizer: expected SGD, Adam or AdamW, got 'sdg'"):
        build_optimizer(layer.parameters(), "sdg", lr=1)
    with pytest.raises(ValueError, match="schedule: expected multistep, cosine or exponential"):
        LearningRate(1.0, 1, "step")
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizer(layer.parameters(), "SGD", lr=1)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_step_is_that_of_the_plain_optimizer_to_rounding(name):
    options = {"lr": 0.1, "weight_decay": 0.01} | ({"momentum": 0.9} if name == "SGD" else {})
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ours = nn.Sequential(conv, nn.Flatten(), nn.Linear(16, 2))
    theirs = copy.deepcopy(ours)
    one = build_optimizer(ours.parameters(), name, **options)
    plain = getattr(torch.optim, name)(theirs.parameters(), **options, foreach=False)
    for _ in range(3):
        image = torch.randn(5, 3, 4, 4)
        for net, optimizer in ((ours, one), (theirs, plain)):
            optimizer.zero_grad()
            net(image).square().sum().backward()
            optimizer.step()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_parameter_that_was_frozen_joins_with_the_plain_optimizer_s_step() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    theirs = copy.deepcopy(ours)
    one = build_optimizer(ours.parameters(), "SGD", lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for step in range(4):
        image = torch.randn(5, 3)
        for net, optimizer in ((ours, one), (theirs, plain)):
            net[0].requires_grad_(step >= 2)
            optimizer.zero_grad()
            net(image).square().sum().backward()
            start_momentum(one)
            optimizer.step()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
