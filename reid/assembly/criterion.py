"""From the config to the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reid.assembly.specs import loss_options
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
        options, weight, name = loss_options(spec, where)
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
