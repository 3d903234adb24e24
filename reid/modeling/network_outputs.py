"""Outputs of a network's modules, and its weights, for losses that name them.

A loss that regularises what is inside a network lists modules in `Loss.network_outputs` and
parameters in `Loss.network_weights`. So it works with any network, and the network need not know of
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reid.modeling.weights import fits_any
from reid.registry import ConfigError, nearest
from reid.structures import Batch


@contextmanager
def recorded_outputs(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Records what modules of a network put out within the block.

    Args:
        network: Runs forward once within the block.
        names: Names of its modules; capital letters do not matter.

    Yields:
        A dict that is empty at first. At the end of the block it has the output of each module: as
        it is, (B, ...), if the module ran once; if it ran n times, as for each of n parts of a map,
        its outputs side by side, (B, n, ...).

    Raises:
        ConfigError: There is no such module, it has no layers, it did not run, or it put out
            something other than a tensor.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    modules = _modules(network) if names else {}
    recorded: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, given: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(
                    f"the output of {name}: expected a tensor, got {type(output).__name__}; name a "
                    "module inside it"
                )
            outputs[name].append(output)

        return record

    try:
        for name in names:
            module = _find_module(modules, name)
            handles.append(module.register_forward_hook(recorder(name)))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
    for name, found in outputs.items():
        if not found:
            raise ConfigError(
                f"the output of {name}: the module did not run in a forward pass of the network"
            )
        recorded[name] = found[0] if len(found) == 1 else torch.stack(found, 1)


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
            raise ConfigError(_unknown("parameter", pattern, list(parameters)))
    return {name: parameter for name, parameter in parameters.items() if fits_any(name, patterns)}


@torch.no_grad()
def try_out(
    network: nn.Module, batch: Batch, outputs: Sequence[str], weights: Sequence[str]
) -> dict[str, Tensor]:
    """What a loss that names these outputs and weights would get for a batch, as in tests.

    It tells before training what would otherwise stop a run in the epoch in which the loss begins.

    Args:
        network: Runs forward once, in evaluation mode.
        batch: On the network's device.
        outputs: Names of modules.
        weights: Patterns of parameters.

    Raises:
        ConfigError: See `recorded_outputs` and `find_weights`.
    """
    found = find_weights(network, weights)
    if not outputs:
        return found
    was_training = network.training
    network.eval()
    try:
        with recorded_outputs(network, outputs) as recorded:
            network(batch)
    finally:
        network.train(was_training)
    return {**recorded, **found}


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules inside, by their names in small letters, as settings have them."""
    return {name.lower(): module for name, module in network.named_modules() if name}


def _find_module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    module = modules.get(name.lower())
    if module is None:
        raise ConfigError(_unknown("module", name, list(modules)))
    if isinstance(module, nn.Sequential) and not len(module):
        raise ConfigError(
            f"the output of {name}: the module has no layers, since the head took them; name "
            "the head's module"
        )
    return module


def _unknown(kind: str, name: str, known: list[str]) -> str:
    hint = nearest(name, known) or f"; it has {', '.join(known[:40])}, ..."
    return f"the network has no {kind} {name!r}{hint}"
