"""TMGF's training step, taken by the trainer."""

from __future__ import annotations

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.fast.step import (
    PRECISIONS,
    OutOfMemory,
    flops_per_image,
    prepare,
    tell_speed,
    too_large,
)
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import Timing, time_calls


def run(context: Context) -> None:
    """Times steps of two batch sizes in three precisions; images are already on the device."""
    parts.import_parts()
    sizes, found = context.sizes, context.found
    flops = flops_per_image(context)
    found.number("gflop_per_image", flops / 1e9)
    height, width = sizes.image
    title = f"Training steps of TMGF at {height}x{width}, {sizes.rows[0]:,} rows in the memory"
    shares = []
    for size, name in ((sizes.small_batch, "small"), (sizes.large_batch, "large")):
        for precision in PRECISIONS:
            what = f"batch {size} in {precision}"
            if not context.enough(1.5 * sizes.seconds, what):
                continue
            try:
                timing = _step(context, size, precision)
            except OutOfMemory:
                too_large(context, what)
                continue
            share = tell_speed(context, title, size, precision, timing, flops)
            found.number(f"step_ms_{name}_{precision}", 1e3 * timing.seconds)
            if name == "large" and share is not None:
                shares.append(share)
    if shares:
        found.number("utilisation_large", max(shares))
    found.note(
        f"The network takes {flops / 1e9:.1f} GFLOP per image, forward and backward. The share is "
        "relative to the TFLOP/s of a large matrix product in the same precision."
    )


def _step(context: Context, size: int, precision: str) -> Timing:
    prepared = prepare(context, PRECISIONS[precision], size)
    return time_calls(
        lambda: prepared.trainer.run_step(prepared.batch),
        context.device,
        context.clock,
        seconds=context.sizes.seconds,
    )
