"""Outputs of a network's modules, and its parameters, for losses that name them.

A loss that regularises maps inside a network, or its weights, lists them in `Loss.maps` and
`Loss.network_weights`. So it works with any network, and the network need not know of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reid.modeling.weights import fits_any
from reid.registry import ConfigError, nearest


@contextmanager
def recorded_maps(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Records what modules of a network put out within the block.

    Args:
        network: Runs forward once within the block.
        names: Names of its modules; capital letters do not matter.

    Yields:
        A dict that is empty at first. At the end of the block it has the output of each module: as
        it is, (B, ...), if the module ran once; if it ran n times, as for each of n parts of a map,
        its outputs side by side, (B, n, ...).

    Raises:
        ConfigError: There is no such module, it did not run, or it put out something other than a
            tensor.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    modules = _modules(network) if names else {}
    maps: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, given: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(
                    f"maps: expected modules that put out a tensor, but {name} gave a "
                    f"{type(output).__name__}"
                )
            outputs[name].append(output)

        return record

    try:
        for name in names:
            if name.lower() not in modules:
                raise ConfigError(_unknown("maps", "module", name, list(modules)))
            handles.append(modules[name.lower()].register_forward_hook(recorder(name)))
        yield maps
    finally:
        for handle in handles:
            handle.remove()
    for name, found in outputs.items():
        if not found:
            raise ConfigError(f"maps: {name} did not run in a forward pass of the network")
        maps[name] = found[0] if len(found) == 1 else torch.stack(found, 1)


def find_weights(network: nn.Module, patterns: Sequence[str]) -> dict[str, Tensor]:
    """The parameters of a network whose names match one of the patterns (`*`, `?`).

    Raises:
        ConfigError: A pattern matches none.
    """
    if not patterns:
        return {}
    parameters: Mapping[str, Tensor] = dict(network.named_parameters())
    for pattern in patterns:
        if not any(fits_any(name, [pattern]) for name in parameters):
            raise ConfigError(_unknown("weights", "parameter", pattern, list(parameters)))
    return {name: parameter for name, parameter in parameters.items() if fits_any(name, patterns)}


def check_maps(network: nn.Module, maps: Sequence[str], weights: Sequence[str]) -> None:
    """Checks, before training, that a network has the modules and parameters that losses name.

    Raises:
        ConfigError: It lacks one.
    """
    modules = _modules(network)
    for name in maps:
        if name.lower() not in modules:
            raise ConfigError(_unknown("maps", "module", name, list(modules)))
    find_weights(network, weights)


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules by their names in small letters, as settings have them."""
    return {name.lower(): module for name, module in network.named_modules()}


def _unknown(key: str, kind: str, name: str, known: list[str]) -> str:
    hint = nearest(name, known) or f"; it has {', '.join(filter(None, known[:40]))}, ..."
    return f"{key}: the network has no {kind} {name!r}{hint}"
