"""Every entry of a checkpoint is checked before any entry is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from reid.engine.checkpoint_schema import check_checkpoint
from reid.engine.randomness import random_state
from reid.solver import build_optimizer

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
        state, model=model.state_dict(), criterion={}, optimizer=optimizer, device_type="cpu"
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
        *parents, last = path.split("/")
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
    "no step": (drop("step"), "step: the entry is missing"),
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
