"""The training step with a compiled network, and recorded whole as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.fast.step import (
    OutOfMemory,
    Prepared,
    flops_per_image,
    prepare,
    tell_speed,
    too_large,
)
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import Timing, free_memory, time_calls

_TABLE = "Training steps of TMGF, compiled"


def run(context: Context) -> None:
    """Times a batch that launches limit, then one that fills the device."""
    parts.import_parts()
    sizes, found = context.sizes, context.found
    on_gpu = context.device.type == "cuda"
    flops = flops_per_image(context)
    shares: list[float | None] = []
    if on_gpu:
        shares += [_graph(context, size, flops) for size in (sizes.small_batch, sizes.large_batch)]
    else:
        found.cut("CUDA graphs: they need a CUDA device")
    plans: list[tuple[parts.CompileMode, int]] = [("default", sizes.small_batch)]
    if on_gpu:
        plans += [
            ("reduce-overhead", sizes.small_batch),
            ("default", sizes.large_batch),
            ("reduce-overhead", sizes.large_batch),
        ]
    for mode, size in plans:
        shares.append(_compiled(context, mode, size, "bf16" if on_gpu else "fp32", flops))
    large = [share for share in shares if share is not None]
    if large:
        found.number("utilisation_large", max(large))
    found.note(
        "`default` and `reduce-overhead` are those of MODEL.COMPILE; the latter records the "
        "network as CUDA graphs. The whole graph records network, losses, memory and optimizer "
        "together, which the trainer does not do: it shows what is left to gain from launches."
    )


def _compiled(
    context: Context, mode: parts.CompileMode, size: int, precision: str, flops: int
) -> float | None:
    """Times a mode; the share of the product."""
    what = f"{mode} at batch {size} in {precision}"
    if not context.enough(15 if context.device.type == "cuda" else 1, what):
        return None
    torch._dynamo.reset()
    try:
        prepared = prepare(context, "bf16" if precision == "bf16" else "off", size)
        parts.compiled(prepared.network, mode)

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


def _graph(context: Context, size: int, flops: int) -> float | None:
    """Times a step that is one CUDA graph."""
    what = f"the whole step as a CUDA graph at batch {size}"
    if not context.enough(3, what):
        return None
    try:
        prepared = prepare(context, "bf16", size)
        replay = record(prepared)
        timing: Timing = time_calls(
            replay, context.device, context.clock, seconds=context.sizes.seconds
        )
    except OutOfMemory:
        too_large(context, what)
        return None
    except RuntimeError as error:  # an operation that cannot be recorded
        text = str(error).partition("\n")[0]
        context.found.cut(f"{what}: it cannot be recorded ({text})")
        free_memory(context.device)
        return None
    return tell_speed(context, _TABLE, size, "bf16", timing, flops, network="whole step, one graph")


def record(prepared: Prepared) -> Callable[[], None]:
    """A call that replays a step in bf16: network, losses, backward, memory, optimizer."""
    network, criterion, batch = prepared.network, prepared.criterion, prepared.batch
    optimizer = prepared.trainer.optimizer

    def step() -> None:
        # The casts of the weights must be part of the recording, not remembered from before it.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            embeddings = network(batch.image, batch.camid)
            losses = parts.losses(criterion, embeddings, batch)
        parts.backward(parts.total(losses))
        optimizer.step()
        parts.finish_step(criterion, embeddings, batch)
        optimizer.zero_grad(set_to_none=False)

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
