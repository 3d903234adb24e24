"""Outputs of modules and weights of a network, for losses that name them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from reid.engine.step import Step
from reid.modeling.losses import Criterion, Loss
from reid.modeling.network_outputs import find_weights, recorded_outputs, try_out
from reid.registry import ConfigError
from reid.structures import Batch, Embeddings


class Net(nn.Module):
    """Runs one layer once, another twice, and a third never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.once = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.pair = nn.LSTM(4, 4)
        self.empty = nn.Sequential()

    def forward(self, batch: Batch) -> Embeddings:
        x = self.once(batch.image.flatten(1))
        x = self.twice(self.twice(x))
        bank = self.pair(x)[0][:, None]
        return Embeddings(bank, bank, bank, bank[:, 0], {"own": x})


BATCH = Batch.of(torch.arange(12.0).reshape(3, 4, 1, 1))


def test_outputs_of_modules_that_run_once_and_twice() -> None:
    net = Net()
    with recorded_outputs(net, ["once", "twice"]) as outputs:
        net(BATCH)
    once = net.once(BATCH.image.flatten(1))
    first = net.twice(once)
    assert outputs["once"].equal(once)
    assert outputs["twice"].equal(torch.stack((first, net.twice(first)), 1))
    net(BATCH)
    assert outputs["twice"].shape == (3, 2, 4)  # nothing is recorded after the block
    copy.deepcopy(net)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("oncee", r"the network has no module 'oncee' \(did you mean 'once'\?\)"),
        ("never", "never: the module did not run"),
        ("pair", "pair: expected a tensor, got tuple"),
        ("empty", "empty: the module has no layers"),
    ],
)
def test_modules_that_give_no_tensor(name: str, problem: str) -> None:
    net = Net()
    with pytest.raises(ConfigError, match=problem), recorded_outputs(net, [name]):
        net(BATCH)
    net(BATCH)
    assert not any(module._forward_hooks for module in net.modules())


def test_weights_by_patterns() -> None:
    net = Net()
    assert find_weights(net, []) == {}
    found = find_weights(net, ["once.*", "tw?ce.weight"])
    assert list(found) == ["once.weight", "once.bias", "twice.weight"]
    assert found["once.bias"] is net.once.bias
    with pytest.raises(ConfigError, match=r"the network has no parameter 'onse\.weight'"):
        find_weights(net, ["once.*", "onse.weight"])


def test_trying_out_changes_nothing() -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = try_out(net, BATCH, ["once", "twice"], ["once.*"])
    assert {name: value.shape for name, value in found.items()} == {
        "once": (3, 4), "twice": (3, 2, 4), "once.weight": (4, 4), "once.bias": (4,),
    }  # fmt: skip
    assert net.training
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    for name in ("x", ""):
        with pytest.raises(ConfigError, match=f"no module '{name}'; it has once, twice"):
            try_out(net, BATCH, [name], [])
    with pytest.raises(ConfigError, match="never: the module did not run"):
        try_out(net, BATCH, ["never"], [])
    assert net.training


class Named(Loss):
    """Takes an output and a weight from its second epoch on."""

    network_outputs = ("once",)
    network_weights = ("twice.weight",)

    @property
    def is_active(self) -> bool:
        return self.epoch >= 1

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        if not self.is_active:
            assert embeddings.aux.keys() == {"own"}
            return {"named": embeddings.pre.sum()}
        assert embeddings.aux.keys() == {"own", "once", "twice.weight"}
        return {"named": embeddings.aux["once"].sum() + embeddings.aux["twice.weight"].sum()}


def test_a_step_gives_them_to_the_losses_that_take_part() -> None:
    net, criterion = Net(), Criterion([Named()])
    step = Step({"student": net}, criterion, {})
    for epoch in (0, 1):
        criterion.set_epoch(epoch)
        net.zero_grad()
        losses, (seen, _) = step(BATCH)
        losses["named"].backward()
        assert seen["student", 0].aux.keys() == {"own"}  # memories are given none of them
    assert net.twice.weight.grad is not None
    assert bool((net.twice.weight.grad == 1).all())
    assert net.pair.weight_ih_l0.grad is None
