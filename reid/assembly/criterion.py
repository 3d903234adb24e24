"""From the config to the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reid.modeling.losses import Criterion
from reid.registry import LOSS, ConfigError, build


def build_criterion(
    specs: Sequence[Any], *, embed_dim: int, num_parts: int, num_classes: int
) -> Criterion:
    """The losses of the list, each with its `weight` (1 if not given) and `as`, its name.

    Raises:
        ConfigError: The list is empty, or an entry is wrong.
    """
    if not specs:
        raise ConfigError("criterion: expected a list of losses, it is empty")
    losses, weights, names = [], [], []
    for number, spec in enumerate(specs):
        where = f"criterion[{number}]"
        options, weight, name = split_loss_spec(spec, where)
        losses.append(
            build(
                LOSS,
                options,
                where,
                embed_dim=embed_dim,
                num_parts=num_parts,
                num_classes=num_classes,
            )
        )
        weights.append(weight)
        names.append(name)
    return Criterion(losses, weights, names)


def split_loss_spec(spec: Any, where: str) -> tuple[dict[str, Any], float, str]:
    """The loss's own spec, its weight, and the name of its values.

    Raises:
        ConfigError: Weight or name is wrong.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    weight, name = options.pop("weight", 1.0), options.pop("as", "")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e9:
        raise ConfigError(f"{where}.weight: expected a number from 0 to 1e9, got {weight!r}")
    if not isinstance(name, str):
        raise ConfigError(f"{where}.as: expected a name, got {name!r}")
    return options, float(weight), name
