"""What a resumed run compares with the run before."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from reid.registry import Hook

logger = logging.getLogger(__name__)

_FORMER_HOOKS = ("WarmUp",)  # checkpoints of version 0.1 have it; `LearningRate` warms up now


def compare_course(course: Mapping[str, str], before: object) -> None:
    """Warns if the bits of a resumed run will differ from those of the run before.

    Args:
        course: See `RunFacts`.
        before: That of the checkpoint.

    Raises:
        ValueError: The checkpoint's is no mapping.
    """
    if not isinstance(before, Mapping):
        raise ValueError(f"course: expected a mapping, got {type(before).__name__}")
    changed = [name for name, now in course.items() if before.get(name, now) != now]
    if "images" in changed:
        logger.warning(
            "The training images have changed since the checkpoint was written: paths or file "
            "sizes differ. Training goes on with the present images"
        )
    if "cpu_threads" in changed:
        logger.warning(
            "The run had %s CPU threads and now has %s: sums will round differently, so the "
            "results will not be bit for bit the same. OMP_NUM_THREADS sets the number",
            before["cpu_threads"],
            course["cpu_threads"],
        )


def match_hooks(
    hooks: Sequence[Hook], states: Sequence[Mapping[str, Any]]
) -> list[tuple[Hook, dict[str, Any]]]:
    """Hooks with their states; warns of those that only one of the two runs has."""
    saved: dict[str, list[dict[str, Any]]] = {}
    for state in states:
        own = {key: value for key, value in state.items() if key != "name"}
        saved.setdefault(state["name"], []).append(own)
    matched, added = [], []
    for hook in hooks:
        name = type(hook).__name__
        if saved.get(name):
            matched.append((hook, saved[name].pop(0)))
        else:
            added.append(name)
    gone = [name for name, rest in saved.items() for _ in rest if name not in _FORMER_HOOKS]
    if added or gone:
        logger.warning(
            "The hooks have changed since the checkpoint was written: %s",
            "; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("added", added), ("removed", gone))
                if names
            ),
        )
    return matched


@contextmanager
def named(hook: Hook) -> Iterator[None]:
    """Has what a hook finds wrong with its state name the hook.

    Raises:
        ValueError: In place of the errors that values of other types and shapes lead to.
    """
    name = f"hooks: the state of {type(hook).__name__}"
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
