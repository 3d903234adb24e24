from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from reid.solver import build_optimizer, build_scheduler


def rates(epochs, **options):
    optimizer = build_optimizer(nn.Linear(2, 2).parameters(), "SGD", lr=options.pop("lr", 1.0))
    scheduler = build_scheduler(optimizer, options.pop("name"), max_epochs=epochs, **options)
    found = []
    for _ in range(epochs):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(found)


@pytest.mark.oracle
def test_every_epochs_rate_is_the_authors(oracle_dir):
    files = sorted(oracle_dir.glob("schedule*.npz"))
    assert files
    for file in files:
        data = np.load(file)
        expected = data["lr_by_epoch"]
        found = rates(
            len(expected),
            name="multistep",
            lr=float(data["base_lr"]),
            milestones=data["milestones"].tolist(),
            gamma=float(data["gamma"]),
            warmup_epochs=int(data["warmup_epochs"]),
            warmup_start=float(data["warmup_factor"]),
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_warmup_and_milestones():
    found = rates(6, name="multistep", milestones=[4], warmup_epochs=2, warmup_start=0.5)
    np.testing.assert_allclose(found, [0.5, 0.75, 1, 1, 0.1, 0.1])


def test_cosine_starts_after_the_warmup_and_ends_at_the_final_rate():
    found = rates(6, name="cosine", warmup_epochs=2, warmup_start=0.0, final_lr_factor=0.1)
    expected = [0, 0.5, 1] + [0.1 + 0.45 * (1 + np.cos(np.pi * t / 4)) for t in (1, 2, 3)]
    np.testing.assert_allclose(found, expected)


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
    with pytest.raises(ValueError, match="schedule: expected multistep or cosine"):
        build_scheduler(torch.optim.SGD(layer.parameters()), "step", max_epochs=1)
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizer(layer.parameters(), "SGD", lr=1)
