"""Every entry of a checkpoint is checked before any entry is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from reid.engine.checkpoint_schema import _check_optimizer, check_checkpoint
from reid.engine.randomness import random_state
from reid.solver import build_optimizer, load_optimizer_state

CPU = torch.device("cpu")


def run(name: str = "Adam") -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model and its optimizer after one step, and their checkpoint."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(conv, nn.BatchNorm2d(4))
    optimizer = build_optimizer(model.parameters(), name, lr=0.1)  # type: ignore[arg-type]
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    state = {
        "epoch": 3,
        "step": 60,
        "model": model.state_dict(),
        "criterion": {},
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                   "growth_interval": 2000, "_growth_tracker": 7},
        "skipped": 0,
        "random": [random_state(CPU)],
        "hooks": [{"name": "SaveCheckpoints"}],
    }  # fmt: skip
    return model, optimizer, copy.deepcopy(state)


def check(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    check_checkpoint(
        state,
        model=model.state_dict(),
        criterion={},
        optimizer=optimizer,
        device_type="cpu",
        processes=1,
    )


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_checkpoint_of_a_run_passes(name: str) -> None:
    check(*run(name))


def moment(change: Callable[[torch.Tensor], Any], name: str = "exp_avg") -> Any:
    def forge(state: dict[str, Any]) -> None:
        first = state["optimizer"]["state"][0]
        first[name] = change(first[name])

    return forge


def put(path: str, value: Any) -> Any:
    def forge(state: dict[str, Any]) -> None:
        node: Any = state
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            node = node[key]
        node[last] = value

    return forge


def drop(path: str) -> Any:
    def forge(state: dict[str, Any]) -> None:
        node: Any = state
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            node = node[key]
        del node[last]

    return forge


FORGED = {
    "epoch is text": (put("epoch", "3"), "epoch: expected a whole number"),
    "epoch below 0": (put("epoch", -5), "epoch: .*got -5"),
    "half an epoch": (put("epoch", 2.5), "epoch: .*got 2.5"),
    "epoch is true": (put("epoch", True), "epoch: .*got True"),
    "epoch is huge": (put("epoch", 10**30), "epoch"),
    "no steps": (drop("step"), "step: the entry is missing"),
    "skipped is NaN": (put("skipped", float("nan")), "skipped: .*got nan"),
    "integer weights": (
        put("model/0.weight", torch.zeros(4, 3, 3, 3, dtype=torch.int8)),
        r"model\.0\.weight: expected torch.float32 .*got torch.int8",
    ),
    "weights of another shape": (put("model/0.bias", torch.zeros(5)), r"model\.0\.bias"),
    "weights that are not finite": (
        put("model/0.bias", torch.full((4,), torch.nan)),
        r"model\.0\.bias: expected finite values",
    ),
    "an unknown weight": (put("model/extra", torch.zeros(1)), "model: does not know extra"),
    "a weight is missing": (drop("model/1.weight"), "model: lacks 1.weight"),
    "moments of another shape": (moment(lambda m: m[:1]), r"optimizer\.state\[0\]\.exp_avg: expec"),
    "moments ten times as long": (moment(lambda m: m.repeat(10, 1, 1, 1)), r"state\[0\]\.exp_avg"),
    "moments of stride 0": (
        moment(lambda m: torch.zeros(()).expand(m.shape)),
        r"optimizer\.state\[0\]\.exp_avg: expected separate memory for each element",
    ),
    "moments of another dtype": (moment(lambda m: m.half()), r"exp_avg: expected torch.float32"),
    "infinite moments": (moment(lambda m: m + torch.inf), r"exp_avg: expected finite values"),
    "negative squares": (moment(lambda m: -m - 1, "exp_avg_sq"), r"exp_avg_sq: expected means of"),
    "a step below 0": (moment(lambda m: m - 9, "step"), r"state\[0\]\.step: expected a number"),
    "moments are text": (moment(lambda m: "none"), r"exp_avg: expected a tensor, got 'none'"),
    "moments of no parameter": (put("optimizer/state/99", {}), "numbers from 0 to 3, got 99"),
    "another group": (put("optimizer/param_groups/0/params", [3, 2, 1, 0]), r"\[0\]\.params"),
    "no groups": (put("optimizer/param_groups", []), "expected 1 groups, got 0"),
    "scale is 0": (put("scaler/scale", 0.0), r"scaler\.scale"),
    "scale is text": (put("scaler/scale", "big"), r"scaler\.scale: .*got 'big'"),
    "an unknown entry of the scaler": (put("scaler/more", 1), r"scaler\.more: unknown entry"),
    "numpy's position": (put("random/0/numpy/2", 10**9), r"random\[0\]\.numpy\[2\]: .*0 to 624"),
    "numpy's words": (put("random/0/numpy/1", torch.zeros(3, dtype=torch.int64)), r"numpy\[1\]"),
    "words of 33 bits": (
        put("random/0/numpy/1", torch.full((624,), 2**32)), r"numpy\[1\]: expected words of 32"
    ),
    "Python's words": (put("random/0/python/1", [1, 2]), r"python\[1\]: expected 625 entries"),
    "Python's version": (put("random/0/python/0", 2), r"python\[0\]"),
    "torch's bytes": (put("random/0/torch", torch.zeros(9, dtype=torch.uint8)), r"\[0\]\.torch"),
    "epochs past all bounds": (put("epoch", 10**30), "epoch: expected .* 0 to 1,000,000"),
    "fewer steps than epochs": (put("step", 2), "step: expected a whole number from 3 to"),
    "more skipped than steps": (put("skipped", 61), "skipped: expected .* 0 to 60, got 61"),
    "a variance below 0": (
        put("model/1.running_var", -torch.ones(4)), r"model\.1\.running_var: a variance is below 0"
    ),
    "batches below 0": (put("model/1.num_batches_tracked", torch.tensor(-1)), "number of batches"),
    "a moment is missing": (
        drop("optimizer/state/0/exp_avg_sq"),
        r"optimizer\.state\[0\]: expected exp_avg, exp_avg_sq, step, got exp_avg, step",
    ),
    "a moment of SGD in Adam": (
        put("optimizer/state/0/momentum_buffer", None), r"got exp_avg, exp_avg_sq, momentum_buffer"
    ),
    "moments ten times as large": (moment(lambda m: 10 * m), r"state\[0\]\.exp_avg: too large"),
    "no moments": (put("optimizer/state", {}), "optimizer.state: expected moments, got none"),
    "no step": (moment(lambda m: m - 1, "step"), r"state\[0\]\.step: expected more than 0"),
    "half a step": (moment(lambda m: m - 0.5, "step"), r"state\[0\]\.step: .*up to 60, got 0\.5"),
    "more steps than batches": (moment(lambda m: m + 60, "step"), r"up to 60, got 61"),
    "a scale that shrinks": (put("scaler/growth_factor", 0.5), r"scaler\.growth_factor"),
    "a scale that never falls": (put("scaler/backoff_factor", 2.0), r"scaler\.backoff_factor"),
    "no interval": (put("scaler/growth_interval", 0), r"scaler\.growth_interval: .*from 1 to"),
    "a tracker of 40 bits": (put("scaler/_growth_tracker", 2**40), r"_growth_tracker: .*to 2,000"),
    "less of the scaler": (drop("scaler/scale"), r"scaler\.scale: the entry is missing"),
    "no process": (put("random", []), "a run with 0 processes, but this run has 1"),
    "numpy's words are 0": (
        put("random/0/numpy/1", torch.zeros(624, dtype=torch.int64)), r"numpy\[1\]: all bits are 0"
    ),
    "numpy's next number": (put("random/0/numpy/4", 1e300), r"random\[0\]\.numpy\[4\]"),
    "Python's words are 0": (put("random/0/python/1", [0] * 625), r"python\[1\]: all bits are 0"),
    "torch's bytes are 0": (
        put("random/0/torch", torch.zeros(5056, dtype=torch.uint8)),
        r"random\[0\]\.torch: is not the state of a generator",
    ),
    "hooks are text": (put("hooks", "all"), "hooks: expected a list, got 'all'"),
    "a hook without a name": (put("hooks/0", {}), r"hooks\[0\]: expected a mapping with the hook"),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_entry_is_named(what: str) -> None:
    forge, message = FORGED[what]
    model, optimizer, state = run()
    forge(state)
    with pytest.raises(ValueError, match=message):
        check(model, optimizer, state)


def test_a_long_list_of_generators_is_not_gone_through() -> None:
    model, optimizer, state = run()
    state["random"] *= 10_000_000
    with pytest.raises(ValueError, match="a run with 10000000 processes"):
        check(model, optimizer, state)


def test_gradients_of_any_kind_give_moments_that_pass() -> None:
    """The bound on Adam's moments holds for steady, rare, tiny and vanishing gradients."""
    steps = torch.arange(400)[:, None]
    gradients = torch.cat(
        [torch.ones(400, 1), steps % 50 == 0, steps == 399, 1e-25 * steps, 0.9**steps, 1.1**steps,
         1e-18 * torch.randn(400, 3), torch.randn(400, 4)], 1
    )  # fmt: skip
    weight = nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer = build_optimizer([weight], "Adam", lr=0.1)
    for number, gradient in enumerate(gradients, 1):
        weight.grad = gradient.float()
        optimizer.step()
        if number % 40 == 1 or number > 390:
            _check_optimizer(optimizer.state_dict(), optimizer, number)


def test_moments_laid_out_in_another_way_are_the_same_moments() -> None:
    """A GPU keeps images' channels last, and a fused kernel reads memory in its own order."""
    ends = []
    for change in (torch.clone, lambda m: m.contiguous(), lambda m: m.mT.contiguous().mT):
        model, optimizer, state = run()
        state["optimizer"]["state"][0]["exp_avg"] = change(
            state["optimizer"]["state"][0]["exp_avg"]
        )
        check(model, optimizer, state)
        load_optimizer_state(optimizer, state["optimizer"])
        optimizer.step()
        ends.append(model[0].weight)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
