"""Builds the losses of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reid.assembly.specs import loss_options
from reid.modeling.losses import Criterion
from reid.registry import LOSS, ConfigError, build


def build_criterion(
    specs: Sequence[Any],
    *,
    embed_dim: int,
    num_parts: int,
    num_classes: int,
    num_cameras: int = 1,
    source_domains: int = 0,
) -> Criterion:
    """Builds a list of losses; each may have a `weight` (default 1) and a name (`as`).

    Raises:
        ConfigError: The list is empty, or an entry is wrong.
    """
    if not specs:
        raise ConfigError("criterion: expected a list of losses, but it is empty")
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
                num_cameras=num_cameras,
                source_domains=source_domains,
            )
        )
        weights.append(weight)
        names.append(name)
    return Criterion(losses, weights, names)
