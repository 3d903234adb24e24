"""What a checkpoint of a run must look like. Every entry is checked before any is loaded.

torch loads an optimizer's moments without a check, and its fused kernels then write to them as if
they had their parameter's shape and layout. numpy accepts any position in its table of random
words. A wrong value could therefore write outside its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MOST_STEPS = 2**53
_NUMPY_WORDS = 624
_PYTHON_WORDS = 625
_POSITIVE = ("exp_avg_sq", "max_exp_avg_sq")
ENTRIES = ("epoch", "step", "model", "criterion", "optimizer", "scaler", "skipped", "random",
           "hooks")  # fmt: skip


def check_checkpoint(
    state: Mapping[str, Any],
    *,
    model: Mapping[str, Tensor],
    criterion: Mapping[str, Tensor],
    optimizer: Optimizer,
    device_type: str,
) -> None:
    """Checks every entry of a checkpoint except the states of hooks, which check theirs themselves.

    Args:
        state: The content of the file.
        model: The state of the model that will load it.
        criterion: The state of the criterion that will load it.
        optimizer: The optimizer, freshly built.
        device_type: The device that training continues on: `cpu` or `cuda`.

    Raises:
        ValueError: An entry is missing or has an unexpected type, shape, dtype or range; the
            message names the entry.
    """
    for name in ENTRIES:
        if name not in state:
            raise ValueError(f"{name}: the entry is missing")
    _whole(state["epoch"], "epoch", 0, _MOST_STEPS)
    _whole(state["step"], "step", 0, _MOST_STEPS)
    _whole(state["skipped"], "skipped", 0, _MOST_STEPS)
    _check_tensors(state["model"], model, "model")
    _check_tensors(state["criterion"], criterion, "criterion")
    _check_optimizer(state["optimizer"], optimizer)
    _check_scaler(state["scaler"])
    _sequence(state["random"], "random")
    for number, generators in enumerate(state["random"]):
        _check_generators(generators, f"random[{number}]", device_type)
    _sequence(state["hooks"], "hooks")
    for number, hook in enumerate(state["hooks"]):
        where = f"hooks[{number}]"
        if not isinstance(hook, Mapping) or not isinstance(hook.get("name"), str):
            raise ValueError(f"{where}: expected a mapping with the hook's name, got {_kind(hook)}")


def _check_tensors(given: Any, expected: Mapping[str, Tensor], where: str) -> None:
    """Requires the same names, shapes and dtypes, and finite values."""
    _mapping(given, where)
    missing = sorted(expected.keys() - given.keys())
    unknown = sorted(map(str, given.keys() - expected.keys()))
    if missing or unknown:
        raise ValueError(
            f"{where}: "
            + "; ".join(
                f"{what} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
                for what, names in (("lacks", missing), ("does not know", unknown))
                if names
            )
        )
    for name, other in expected.items():
        _tensor(given[name], f"{where}.{name}", other.shape, other.dtype)


def _check_optimizer(given: Any, optimizer: Optimizer) -> None:
    """Requires the same parameter groups, and moments with their parameter's shape and layout."""
    _mapping(given, "optimizer")
    groups, states = given.get("param_groups"), given.get("state")
    _sequence(groups, "optimizer.param_groups")
    _mapping(states, "optimizer.state")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"optimizer.param_groups: expected {len(optimizer.param_groups)} groups, got "
            f"{len(groups)}"
        )
    parameters: list[Tensor] = []
    for number, (group, built) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        where = f"optimizer.param_groups[{number}]"
        _mapping(group, where)
        first = len(parameters)
        parameters += built["params"]
        if group.get("params") != list(range(first, len(parameters))):
            raise ValueError(
                f"{where}.params: expected the numbers {first} to {len(parameters) - 1} in order"
            )
    for key, moments in states.items():
        if type(key) is not int or not 0 <= key < len(parameters):
            raise ValueError(
                f"optimizer.state: expected numbers from 0 to {len(parameters) - 1}, got {key!r}"
            )
        where = f"optimizer.state[{key}]"
        _mapping(moments, where)
        for name, value in moments.items():
            _check_moment(value, f"{where}.{name}", parameters[key])


def _check_moment(value: Any, where: str, parameter: Tensor) -> None:
    name = where.rpartition(".")[2]
    if value is None and name == "momentum_buffer":  # before the first step
        return
    if name == "step":
        if not isinstance(value, Tensor):
            _whole(value, where, 0, _MOST_STEPS)
            return
        _tensor(value, where, torch.Size(()), torch.float32)
        if not 0 <= float(value) <= _MOST_STEPS:
            raise ValueError(f"{where}: expected a number of steps, got {float(value)}")
        return
    _tensor(value, where, parameter.shape, parameter.dtype)
    if value.stride() != parameter.stride() and not _is_dense(value):
        raise ValueError(
            f"{where}: expected separate memory for each element, but elements share it"
        )
    if name in _POSITIVE and bool((value < 0).any()):
        raise ValueError(f"{where}: expected means of squares, but a value is below 0")


def _is_dense(value: Tensor) -> bool:
    """Whether no two elements share memory: the strides fit a dense tensor with permuted axes."""
    size = 1
    for stride, length in sorted(zip(value.stride(), value.shape, strict=True)):
        if length > 1:
            if stride != size:
                return False
            size *= length
    return True


def _check_scaler(given: Any) -> None:
    _mapping(given, "scaler")
    for name, value in given.items():
        if name == "_growth_tracker" or name == "growth_interval":
            _whole(value, f"scaler.{name}", 0, _MOST_STEPS)
        elif name in ("scale", "growth_factor", "backoff_factor"):
            _number(value, f"scaler.{name}", lambda number: 0 < number <= 2.0**127)
        else:
            raise ValueError(f"scaler.{name}: unknown entry")


def _check_generators(given: Any, where: str, device_type: str) -> None:
    """Checks the states of Python's, numpy's and torch's generators; see `random_state`."""
    _mapping(given, where)
    for name in ("python", "numpy", "torch"):
        if name not in given:
            raise ValueError(f"{where}.{name}: the entry is missing")
    python = given["python"]
    _sequence(python, f"{where}.python", 3)
    version, words, gauss = python
    _whole(version, f"{where}.python[0]", 3, 3)
    _sequence(words, f"{where}.python[1]", _PYTHON_WORDS)
    for word in words[:-1]:
        _whole(word, f"{where}.python[1]", 0, 2**32 - 1)
    _whole(words[-1], f"{where}.python[1]", 0, _NUMPY_WORDS)
    if gauss is not None:
        _number(gauss, f"{where}.python[2]", math.isfinite)
    _check_numpy(given["numpy"], f"{where}.numpy")
    _check_bytes(given["torch"], f"{where}.torch", torch.get_rng_state())
    if device_type == "cuda" and "cuda" in given:
        _check_bytes(given["cuda"], f"{where}.cuda", torch.cuda.get_rng_state())


def _check_numpy(given: Any, where: str) -> None:
    _sequence(given, where, 5)
    name, words, position, has_gauss, gauss = given
    if name != "MT19937":
        raise ValueError(f"{where}[0]: expected 'MT19937', got {name!r}")
    _tensor(words, f"{where}[1]", torch.Size((_NUMPY_WORDS,)), torch.int64)
    if bool(((words < 0) | (words >= 2**32)).any()):
        raise ValueError(f"{where}[1]: expected words of 32 bits")
    _whole(position, f"{where}[2]", 0, _NUMPY_WORDS)
    _whole(has_gauss, f"{where}[3]", 0, 1)
    _number(gauss, f"{where}[4]", math.isfinite)


def _check_bytes(given: Any, where: str, like: Tensor) -> None:
    _tensor(given, where, like.shape, torch.uint8)


def _tensor(value: Any, where: str, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{where}: expected a tensor, got {_kind(value)}")
    if value.shape != shape or value.dtype != dtype or value.layout != torch.strided:
        raise ValueError(
            f"{where}: expected {dtype} {tuple(shape)}, got {value.dtype} {tuple(value.shape)}"
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{where}: expected finite values, but some are NaN or infinite")


def _whole(value: Any, where: str, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(
            f"{where}: expected a whole number from {low:,} to {high:,}, got {_kind(value)}"
        )


def _number(value: Any, where: str, accepts: Callable[[float], bool]) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not accepts(float(value)):
        raise ValueError(f"{where}: expected a finite number in its range, got {_kind(value)}")


def _mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {_kind(value)}")


def _sequence(value: Any, where: str, length: int | None = None) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where}: expected a list, got {_kind(value)}")
    if length is not None and len(value) != length:
        raise ValueError(f"{where}: expected {length} entries, got {len(value)}")


def _kind(value: Any) -> str:
    """A value as messages show it: numbers and text as they are, otherwise the type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) < 60 else f"{text[:60]}..."
    return type(value).__name__
