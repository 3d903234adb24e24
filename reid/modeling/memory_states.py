"""What the losses of a run keep over the epochs: features to cluster, and state for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reid.modeling.losses import Loss
from reid.structures import FeatureSet


def kept_features(losses: Iterable[Loss]) -> FeatureSet | None:
    """The features of the first loss that keeps any; see `Loss.kept_features`."""
    kept = (loss.kept_features() for loss in losses)
    return next((features for features in kept if features is not None), None)


def memory_states(losses: Iterable[Loss]) -> list[dict[str, Tensor]]:
    """`Loss.memory_state` of each loss; an empty list if no loss keeps anything."""
    states = [loss.memory_state() for loss in losses]
    return states if any(states) else []


def check_memory_states(losses: Iterable[Loss], states: Any, count: int) -> None:
    """Checks states for `load_memory_states`; see `Loss.check_memory_state`.

    Args:
        losses: The losses that will load the states.
        states: Part of a checkpoint.
        count: Number of training images.

    Raises:
        ValueError: `memory_states` of these losses cannot have returned the states.
    """
    given = list(losses)
    if not isinstance(states, list) or len(states) not in (0, len(given)):
        raise ValueError(f"expected a list with a mapping for each of {len(given)} losses")
    for number, loss in enumerate(given):
        state = states[number] if states else {}
        if not isinstance(state, Mapping):
            raise ValueError(f"[{number}]: expected a mapping, got {type(state).__name__}")
        try:
            loss.check_memory_state(state, count)
        except ValueError as error:
            raise ValueError(f"[{number}] ({type(loss).__name__}): {error}") from error


def load_memory_states(losses: Iterable[Loss], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Restores what `memory_states` returned."""
    for loss, state in zip(losses, states, strict=bool(states)):
        loss.load_memory_state(state)


def check_entries(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Requires a state to have these entries, and no others.

    Raises:
        ValueError: Entries are missing or unknown.
    """
    wanted = set(names)
    if state.keys() != wanted:
        given = ", ".join(sorted(map(str, state))) or "nothing"
        raise ValueError(f"expected {', '.join(sorted(wanted))}, got {given}")


def check_vectors(value: Any, name: str, ndim: int) -> None:
    """Requires finite single-precision vectors.

    Raises:
        ValueError: It is no such tensor.
    """
    if (
        not isinstance(value, Tensor)
        or value.dtype != torch.float32
        or value.ndim != ndim
        or not bool(torch.isfinite(value).all())
    ):
        raise ValueError(f"{name}: expected a tensor of finite float32 numbers with {ndim} axes")


def check_numbers(value: Any, name: str, count: int, below: int) -> None:
    """Requires a whole number from -1 to `below` - 1 for each of `count` images.

    Raises:
        ValueError: It is no such tensor, or the number of images has changed.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.ndim != 1:
        raise ValueError(f"{name}: expected a tensor of int64 numbers with 1 axis")
    if len(value) != count:
        raise ValueError(
            f"{name}: the checkpoint comes from a run on {len(value):,} training images, but this "
            f"run has {count:,}"
        )
    if count and not -1 <= int(value.min()) <= int(value.max()) < below:
        raise ValueError(f"{name}: expected numbers from -1 to {below - 1:,}")
