"""Compares the losses of TMGF's first steps in each precision with the CPU's."""

from __future__ import annotations

import time

import torch

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.exact import exact_products
from reid.workflows.gpu_check.findings import Context

_LIMITS: dict[parts.Amp, float] = {"off": 1e-3, "fp16": 3e-2, "bf16": 1e-1}
_CPU_SHARE = 0.5


def run(context: Context) -> None:
    """Trains the same network on the same batches on the CPU and on the device."""
    parts.import_parts()
    sizes, found = context.sizes, context.found
    end = context.clock.left() * (1 - _CPU_SHARE)
    begun = time.perf_counter()
    expected = _losses(context, torch.device("cpu"), "off", sizes.steps, end)
    found.number("cpu_step_seconds", (time.perf_counter() - begun) / len(expected))
    columns: dict[str, list[float]] = {"CPU fp32": expected}
    if len(expected) < sizes.steps:
        found.note(f"The CPU had time for {len(expected)} of {sizes.steps} steps.")
    for amp, limit in _LIMITS.items():
        name = "fp32" if amp == "off" else amp
        if not context.enough(1, name):
            continue
        with exact_products():
            seen = _losses(context, context.device, amp, len(expected), 0.0)
        columns[name] = seen
        errors = [abs(a / b - 1) for a, b in zip(seen, expected, strict=False)]
        finite = len(seen) == len(expected) and all(error == error for error in errors)
        found.check(
            f"the losses of {len(expected)} steps in {name} are the CPU's in fp32, to {limit:g}",
            finite and max(errors) <= limit,
            f"largest relative difference {max(errors):.1e}, at the end {errors[-1]:.1e}",
        )
    for step in range(len(expected)):
        cells = {
            name: values[step] if step < len(values) else None for name, values in columns.items()
        }
        found.row("Sum of the losses by step", step=step + 1, **cells)


def _losses(
    context: Context, device: torch.device, amp: parts.Amp, steps: int, end: float
) -> list[float]:
    """Losses of up to `steps` steps, at least one, while more than `end` seconds are left."""
    sizes = context.sizes
    network = parts.make_network(sizes, torch.device("cpu"), drop_path=0.0).to(device)
    labelled = parts.make_labelled(sizes.rows[0], 1 + network.num_parts, sizes.dim, device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
    trainer = parts.make_trainer(network, criterion, device, amp=amp)
    losses: list[float] = []
    while len(losses) < steps and (not losses or context.clock.left() > end):
        batch = parts.make_batch(labelled, sizes.cpu_batch, sizes.image, device, len(losses))
        trainer.run_step(batch)
        losses.append(parts.loss_of(trainer))
    return losses
