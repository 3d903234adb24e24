"""Checks that nothing in a training step makes the host wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.findings import Context

_MESSAGE = "called a synchronizing CUDA operation"
_ROOT = Path(__file__).parents[4]


def run(context: Context) -> None:
    """Takes steps while torch reports every operation that synchronises."""
    parts.import_parts()
    sizes, found, device = context.sizes, context.found, context.device
    on_gpu = device.type == "cuda"
    if not on_gpu:
        found.cut("the report of operations that wait: it needs a CUDA device; the steps were run")
    network = parts.make_network(sizes, device, depth=sizes.short_depth)
    labelled = parts.make_labelled(sizes.rows[0], 1 + network.num_parts, sizes.dim, device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
    host = parts.make_batch(labelled, sizes.small_batch, sizes.image, torch.device("cpu"))
    host = parts.pinned(host) if on_gpu else host
    settings: tuple[tuple[str, parts.Amp, float], ...] = (
        ("in fp32", "off", 0.0), ("in bf16", "bf16", 0.0), ("in fp16", "fp16", 0.0),
        ("in fp16 with clipping", "fp16", 1.0),
    )  # fmt: skip
    for what, amp, clip in settings:
        trainer = parts.make_trainer(network, criterion, device, amp=amp, clip=clip)

        def step(trainer: parts.Trainer = trainer) -> None:
            trainer.run_step(host.to(device))

        for _ in range(3):
            step()
        if not on_gpu:
            continue
        lines = waiting_lines(step)
        found.check(
            f"a step {what}, with its copy to the device, waits for nothing",
            not lines,
            ", ".join(f"{line} {count} times" for line, count in lines.items()),
        )


def waiting_lines(work: Callable[[], None]) -> dict[str, int]:
    """The lines at which `work` waits for the GPU, and how often.

    torch's debug mode does not see waiting for an event. The trainer does this once per step: it
    waits for the end of the forward pass while the device works on the backward pass.
    """
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{_short(warning.filename)}:{warning.lineno}"
        for warning in caught
        if _MESSAGE in str(warning.message)
    ]
    return dict(Counter(places))


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else "/".join(path.parts[-3:])
