"""Shows where the time of a training step goes."""

from __future__ import annotations

import torch

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.fast.step import OutOfMemory, prepare, too_large
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import Laps

_STEPS = 10
_ORDER = ("copy", "forward", "losses", "backward", "optimizer", "other")


def run(context: Context) -> None:
    """Times the parts of some steps in fp16 with marks in the device's stream."""
    parts.import_parts()
    sizes = context.sizes
    for size, name in ((sizes.small_batch, "small"), (sizes.large_batch, "large")):
        if not context.enough(sizes.seconds, f"batch {size}"):
            continue
        try:
            _measure(context, size, name)
        except OutOfMemory:
            too_large(context, f"batch {size}")
    context.found.note(
        "On a GPU, a part's time includes waiting for the host. `other` is the rest of "
        "the trainer's step: copying and restoring what an overflow would change."
    )


def _measure(context: Context, size: int, name: str) -> None:
    device = context.device
    prepared = prepare(context, "fp16", size)
    host = prepared.batch.to(torch.device("cpu"), non_blocking=False)
    host = parts.pinned(host) if device.type == "cuda" else host
    for _ in range(3):
        prepared.trainer.run_step(host.to(device))
    laps = Laps(device)
    handles = parts.watch_step(prepared.trainer, laps.lap)
    for _ in range(_STEPS):
        laps.lap("other")
        batch = host.to(device)
        laps.lap("copy")
        prepared.trainer.run_step(batch)
    laps.lap("other")
    for handle in handles:
        handle.remove()
    taken = {part: value / _STEPS for part, value in laps.milliseconds().items()}
    total = sum(taken.values())
    for part in _ORDER:
        context.found.row(
            f"Parts of a step in fp16, batch {size}", part=part, ms=taken.get(part, 0.0),
            share=f"{taken.get(part, 0.0) / total:.1%}",
        )  # fmt: skip
    context.found.row(f"Parts of a step in fp16, batch {size}", part="all", ms=total, share="")
    context.found.number(f"loss_share_{name}", taken.get("losses", 0.0) / total)
    context.found.number(f"copy_ms_{name}", taken.get("copy", 0.0))
