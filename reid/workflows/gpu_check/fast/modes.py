"""The training step with a compiled network."""

from __future__ import annotations

import time

import torch

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.capture import compile_or_capture
from reid.workflows.gpu_check.fast.step import (
    OutOfMemory,
    flops_per_image,
    prepare,
    tell_speed,
    too_large,
)
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import time_calls

_TABLE = "Training steps of TMGF, compiled"


def run(context: Context) -> None:
    """Times a small batch, which launches limit, and a large one, which fills the device."""
    parts.import_parts()
    sizes, found = context.sizes, context.found
    flops = flops_per_image(context)
    on_gpu = context.device.type == "cuda"
    shares: list[float | None] = []
    plans: list[tuple[parts.CompileMode, int]] = [("default", sizes.small_batch)]
    if on_gpu:
        plans += [
            ("reduce-overhead", sizes.small_batch),
            ("default", sizes.large_batch),
            ("reduce-overhead", sizes.large_batch),
        ]
    else:
        found.cut("compilation: on a CPU the graph is only captured, and runs uncompiled")
    for mode, size in plans:
        share = _compiled(context, mode, size, "bf16" if on_gpu else "fp32", flops)
        shares += [share] if size == sizes.large_batch else []
    large = [share for share in shares if share is not None]
    if large:
        found.number("utilisation_large", max(large))
    found.note(
        "`default` and `reduce-overhead` are those of MODEL.COMPILE; the latter records the "
        "network as CUDA graphs."
    )


def _compiled(
    context: Context, mode: parts.CompileMode, size: int, precision: str, flops: int
) -> float | None:
    """Times a mode; returns its share of the matrix product's speed."""
    what = f"{mode} at batch {size} in {precision}"
    if not context.enough(15 if context.device.type == "cuda" else 1, what):
        return None
    torch._dynamo.reset()
    try:
        prepared = prepare(context, "bf16" if precision == "bf16" else "off", size)
        compile_or_capture(prepared.network, mode, context.device)

        def step() -> None:
            prepared.trainer.run_step(prepared.batch)

        begun = time.perf_counter()
        step()
        compiling = time.perf_counter() - begun
        timing = time_calls(step, context.device, context.clock, seconds=context.sizes.seconds)
    except OutOfMemory:
        too_large(context, what)
        return None
    return tell_speed(
        context, _TABLE, size, precision, timing, flops, network=mode, seconds_to_compile=compiling
    )
