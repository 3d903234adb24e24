"""Checks that the device's memory does not grow over many steps."""

from __future__ import annotations

import gc
import resource

import torch

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory, peak_mb, synchronize

_WARM_UP = 0.1
_LIMIT_MB = 1.0


def run(context: Context) -> None:
    """Takes many steps with different batches, and compares memory use early and late."""
    parts.import_parts()
    sizes, found, device = context.sizes, context.found, context.device
    free_memory(device)
    network = parts.make_network(sizes, device)
    labelled = parts.make_labelled(sizes.rows[0], 1 + network.num_parts, sizes.dim, device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
    trainer = parts.make_trainer(network, criterion, device, amp="fp16")
    batches = [
        parts.make_batch(labelled, sizes.small_batch, sizes.image, device, number)
        for number in range(4)
    ]
    early, peak, done = 0.0, None, 0
    for step in range(sizes.many_steps):
        if step and context.clock.left() < 0:
            break
        trainer.run_step(batches[step % len(batches)])
        done = step + 1
        if done == max(round(_WARM_UP * sizes.many_steps), 1):
            early, peak = _used_mb(device), peak_mb(device)
    late = _used_mb(device)
    if done < sizes.many_steps:
        found.cut(f"steps {done + 1} to {sizes.many_steps}: no time was left")
    found.number("steps", done)
    if device.type != "cuda":
        found.note(f"This process grew by {late - early:.1f} MB, including torch's caches.")
        return
    found.check(
        f"memory in use after {done} steps is that after {round(_WARM_UP * sizes.many_steps)}, to "
        f"{_LIMIT_MB:g} MB",
        late - early <= _LIMIT_MB,
        f"{early:.1f} and {late:.1f} MB",
    )
    largest = peak_mb(device)
    assert peak is not None
    assert largest is not None
    found.check(
        f"its peak does not rise by more than {_LIMIT_MB:g} MB",
        largest - peak <= _LIMIT_MB,
        f"{peak:.1f} and {largest:.1f} MB",
    )


def _used_mb(device: torch.device) -> float:
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
