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
from torch.optim import Adam, Optimizer

from reid.modeling.batchnorm import wrong_statistic

_MOST_EPOCHS = 10**6
_MOST_STEPS = 10**12
_NUMPY_WORDS = 624
_PYTHON_WORDS = 625
_LARGEST_NORMAL = 13  # no generator gets a larger one from numbers of 53 bits
_MOMENTS = {
    "SGD": {"momentum_buffer"},
    "Adam": {"step", "exp_avg", "exp_avg_sq"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
}
_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
ENTRIES = ("epoch", "step", "model", "criterion", "optimizer", "scaler", "skipped", "random",
           "hooks")  # fmt: skip


def check_checkpoint(
    state: Mapping[str, Any],
    *,
    model: Mapping[str, Tensor],
    criterion: Mapping[str, Tensor],
    optimizer: Optimizer,
    device_type: str,
    processes: int,
) -> None:
    """Checks every entry of a checkpoint except the hooks' states (`Hook.check_state` does those).

    Args:
        state: The content of the file.
        model: The state of the model that will load it.
        criterion: The state of the criterion that will load it.
        optimizer: The optimizer, freshly built.
        device_type: The device that training continues on: `cpu` or `cuda`.
        processes: The number of processes that training continues with.

    Raises:
        ValueError: An entry is missing or has an unexpected type, shape, dtype or range, or the
            run had another number of processes; the message names the entry.
    """
    for name in ENTRIES:
        if name not in state:
            raise ValueError(f"{name}: the entry is missing")
    _whole(state["epoch"], "epoch", 0, _MOST_EPOCHS)
    _whole(state["step"], "step", state["epoch"], _MOST_STEPS)
    _whole(state["skipped"], "skipped", 0, state["step"])
    check_tensors(state["model"], model, "model")
    check_tensors(state["criterion"], criterion, "criterion")
    _check_optimizer(state["optimizer"], optimizer, state["step"])
    _check_scaler(state["scaler"])
    _sequence(state["random"], "random")
    if len(state["random"]) != processes:
        raise ValueError(
            f"the checkpoint comes from a run with {len(state['random'])} processes, but this run "
            f"has {processes}; start as many as before"
        )
    for number, generators in enumerate(state["random"]):
        _check_generators(generators, f"random[{number}]", device_type)
    _sequence(state["hooks"], "hooks")
    for number, hook in enumerate(state["hooks"]):
        where = f"hooks[{number}]"
        if not isinstance(hook, Mapping) or not isinstance(hook.get("name"), str):
            raise ValueError(f"{where}: expected a mapping with the hook's name, got {_kind(hook)}")


def check_stage(state: Mapping[str, Any]) -> None:
    """Checks what tells the stage of a checkpoint from a run with stages.

    Raises:
        ValueError: An entry is missing or out of its range; the message names the entry.
    """
    _whole(state.get("epoch"), "epoch", 1, _MOST_EPOCHS)
    _whole(state.get("step"), "step", 0, _MOST_STEPS)
    _mapping(state.get("stage"), "stage")
    _whole(state["stage"].get("first_step"), "stage.first_step", 0, state["step"])


def check_students(state: Mapping[str, Any], students: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Checks the networks that are trained beside the model.

    Args:
        state: The content of the file.
        students: The state of each network that will load it, by name.

    Raises:
        ValueError: The run had other ones, or a tensor does not fit; the message names the entry.
    """
    given = state.get("students", {})
    _mapping(given, "students")
    if given.keys() != students.keys():
        raise ValueError(
            f"students: expected {', '.join(students) or 'none'} beside the model, as in "
            f"model.students; got {', '.join(sorted(map(str, given))) or 'none'}"
        )
    for name, expected in students.items():
        check_tensors(given[name], expected, f"students.{name}")


def check_tensors(given: Any, expected: Mapping[str, Tensor], where: str) -> None:
    """Requires the same names, shapes and dtypes, and values that a training can reach.

    Args:
        given: Part of a checkpoint.
        expected: The tensors that will load it.
        where: The entry, for messages.

    Raises:
        ValueError: Names, shapes or dtypes differ, a value is not finite, or a statistic of
            BatchNorm is impossible.
    """
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
        if problem := wrong_statistic(name, given[name]):
            raise ValueError(f"{where}.{name}: {problem}")


def _check_optimizer(given: Any, optimizer: Optimizer, steps: int) -> None:
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
    if steps and not states and isinstance(optimizer, Adam):  # skipped steps create moments too
        raise ValueError("optimizer.state: expected moments, got none")
    for key, moments in states.items():
        if type(key) is not int or not 0 <= key < len(parameters):
            raise ValueError(
                f"optimizer.state: expected numbers from 0 to {len(parameters) - 1}, got {key!r}"
            )
        where = f"optimizer.state[{key}]"
        _mapping(moments, where)
        wanted = _MOMENTS.get(type(optimizer).__name__, moments.keys())
        if moments and moments.keys() != wanted:
            raise ValueError(
                f"{where}: expected {', '.join(sorted(wanted))}, got "
                f"{', '.join(sorted(map(str, moments)))}"
            )
        for name, value in moments.items():
            _check_moment(value, f"{where}.{name}", parameters[key], steps)
        if moments and isinstance(optimizer, Adam):
            _check_first_moment(moments, where, optimizer.param_groups[0]["betas"])


def _check_first_moment(
    moments: Mapping[str, Tensor], where: str, betas: tuple[float, float]
) -> None:
    """Requires the mean m of the gradients to fit the mean v of their squares.

    For any gradients, Cauchy-Schwarz gives m^2 <= v (1 - b1)^2 / (1 - b2) / (1 - b1^2 / b2).
    """
    if not moments["step"] and bool(moments["exp_avg_sq"].any()):  # an overflow leaves zeros
        raise ValueError(f"{where}.step: expected more than 0 steps, since the moments are not 0")
    first, second = betas
    most = (1 - first) / math.sqrt((1 - second) * (1 - first**2 / second))
    # squares of gradients below 1e-22 are 0
    limit = moments["exp_avg_sq"].sqrt() * (1.01 * most) + 1e-15
    if bool((moments["exp_avg"].abs() > limit).any()):
        raise ValueError(f"{where}.exp_avg: too large for this exp_avg_sq, whatever the gradients")


def _check_moment(value: Any, where: str, parameter: Tensor, steps: int) -> None:
    name = where.rpartition(".")[2]
    if value is None and name == "momentum_buffer":  # before the first step
        return
    if name == "step":
        if isinstance(value, Tensor):
            _tensor(value, where, torch.Size(()), torch.float32)
            value = float(value)
        if type(value) not in (int, float) or value != int(value) or not 0 <= value <= steps:
            raise ValueError(f"{where}: expected a number of steps up to {steps:,}, got {value}")
        return
    _tensor(value, where, parameter.shape, parameter.dtype)
    if value.stride() != parameter.stride() and not _is_dense(value):
        raise ValueError(
            f"{where}: expected separate memory for each element, but elements share it"
        )
    if name == "exp_avg_sq" and bool((value < 0).any()):
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
    if not given:  # of a run without fp16
        return
    for name in (*_SCALER, *given):
        if name not in given:
            raise ValueError(f"scaler.{name}: the entry is missing")
        if name not in _SCALER:
            raise ValueError(f"scaler.{name}: unknown entry")
    _number(given["scale"], "scaler.scale", lambda number: 2.0**-64 <= number <= 2.0**127)
    _number(given["growth_factor"], "scaler.growth_factor", lambda number: 1 < number <= 2.0**16)
    _number(given["backoff_factor"], "scaler.backoff_factor", lambda number: 0 < number < 1)
    _whole(given["growth_interval"], "scaler.growth_interval", 1, 2**31 - 1)
    _whole(given["_growth_tracker"], "scaler._growth_tracker", 0, given["growth_interval"])


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
    _check_words(words[:-1], f"{where}.python[1]")
    if gauss is not None:
        _number(gauss, f"{where}.python[2]", _is_normal)
    _check_numpy(given["numpy"], f"{where}.numpy")
    _check_torch(given["torch"], f"{where}.torch", "cpu")
    if device_type == "cuda" and "cuda" in given:
        _check_torch(given["cuda"], f"{where}.cuda", "cuda")


def _check_words(words: Sequence[int], where: str) -> None:
    """Requires a bit that is not 0; of the first word only the highest bit counts."""
    if words[0] < 2**31 and not any(words[1:]):
        raise ValueError(f"{where}: all bits are 0, which gives no random numbers")


def _is_normal(value: float) -> bool:
    return abs(value) <= _LARGEST_NORMAL


def _check_numpy(given: Any, where: str) -> None:
    _sequence(given, where, 5)
    name, words, position, has_gauss, gauss = given
    if name != "MT19937":
        raise ValueError(f"{where}[0]: expected 'MT19937', got {name!r}")
    _tensor(words, f"{where}[1]", torch.Size((_NUMPY_WORDS,)), torch.int64)
    if bool(((words < 0) | (words >= 2**32)).any()):
        raise ValueError(f"{where}[1]: expected words of 32 bits")
    _check_words(words.tolist(), f"{where}[1]")
    _whole(position, f"{where}[2]", 0, _NUMPY_WORDS)
    _whole(has_gauss, f"{where}[3]", 0, 1)
    _number(gauss, f"{where}[4]", _is_normal)


def _check_torch(given: Any, where: str, device_type: str) -> None:
    """Requires a generator with this state to give random numbers."""
    generator = torch.Generator(device_type)
    _tensor(given, where, generator.get_state().shape, torch.uint8)
    try:
        generator.set_state(given.clone())
        normal = torch.randn(1, dtype=torch.float64, device=device_type, generator=generator)
        words = torch.randint(2**31, (8,), device=device_type, generator=generator)
    except RuntimeError as error:
        raise ValueError(f"{where}: is not the state of a generator ({error})") from error
    if not _is_normal(float(normal)) or bool((words == words[0]).all()):
        raise ValueError(f"{where}: gives no random numbers")


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
