"""Compares every loss on the device with the CPU: values, gradients, memories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reid.registry import ConfigError
from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.findings import Context

_STEPS = 2
_LIMIT = 1e-5
_DTYPES = {"double": torch.float64, "single": torch.float32}


class _Sides(NamedTuple):
    """The input of one side."""

    network: Any
    labelled: parts.Labelled
    batch: parts.Batch


def run(context: Context) -> None:
    """Compares each registered loss in double and in single precision.

    In double precision everything must agree. In single precision, rounding may decide which of two
    almost equal proxies is the 50th hardest, which changes a gradient; so only losses and memories
    are compared.
    """
    parts.import_parts()
    sizes, cpu = context.sizes, torch.device("cpu")
    sides = {}
    for device in (cpu, context.device):
        network = parts.make_network(sizes, device, depth=sizes.short_depth)
        banks = 1 + network.num_parts
        labelled = parts.make_labelled(sizes.rows[0], banks, sizes.dim, device)
        batch = parts.make_batch(labelled, sizes.small_batch, (1, 1), device)
        sides[device] = _Sides(network, labelled, batch)
    for spec in parts.loss_specs():
        name = ", ".join(str(value) for value in spec.values())
        if not context.enough(1, name):
            continue
        for bits, dtype in _DTYPES.items():
            try:
                expected = _steps(spec, sides[cpu], cpu, dtype)
            except ConfigError as error:
                context.found.cut(f"{name}: this check cannot build it ({error})")
                break
            seen = _steps(spec, sides[context.device], context.device, dtype)
            if dtype is torch.float32:
                seen = {key: value for key, value in seen.items() if "gradient" not in key}
            errors = {key: _difference(value, expected[key]) for key, value in seen.items()}
            worst = max(errors, key=lambda key: errors[key])
            context.found.check(
                f"{name} agrees with the CPU in {bits} precision, to {_LIMIT:g}",
                errors[worst] <= _LIMIT,
                f"largest relative difference {errors[worst]:.1e}, of {worst}",
            )


def _steps(
    spec: Mapping[str, Any], side: _Sides, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Losses, gradients and memories of two steps, on the CPU."""
    torch.manual_seed(0)  # for the weights of classifiers
    labelled = replace(side.labelled, banks=side.labelled.banks.to(dtype))
    criterion = parts.make_criterion([spec], side.network, labelled, torch.device("cpu"))
    criterion = criterion.to(device, dtype)
    parts.relabel(criterion, labelled.labels, labelled.features, epoch=100)
    found: dict[str, Tensor] = {}
    for step in range(_STEPS):
        feature = parts.near_features(labelled, side.batch).to(dtype).requires_grad_()
        embeddings = parts.embeddings_of(feature)
        losses = parts.losses(criterion, embeddings, side.batch)
        parts.backward(parts.total(losses))
        parts.finish_step(criterion, embeddings, side.batch)
        assert feature.grad is not None
        found |= {f"{key} in step {step + 1}": value for key, value in losses.items()}
        found[f"the gradient in step {step + 1}"] = feature.grad
        for key, rows in parts.memories(criterion).items():
            found[f"{key} after step {step + 1}"] = rows
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def _difference(seen: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((seen - expected).abs().max()) if expected.numel() else 0.0
    return error / max(largest, 1e-12) if error == error else float("inf")
