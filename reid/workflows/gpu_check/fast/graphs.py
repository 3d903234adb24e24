"""The whole training step, recorded as a CUDA graph."""

from __future__ import annotations

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
from reid.workflows.gpu_check.timing import free_memory, time_calls


def run(context: Context) -> None:
    """Times the replay of a step in bf16; on a CPU there is nothing to record."""
    parts.import_parts()
    if context.device.type != "cuda":
        context.found.cut("CUDA graphs: they need a CUDA device")
        return
    flops = flops_per_image(context)
    for size in (context.sizes.small_batch, context.sizes.large_batch):
        _measure(context, size, flops)
    context.found.note(
        "One graph holds network, losses, memory and optimizer. The trainer does not do this; the "
        "time shows how much launches cost."
    )


def _measure(context: Context, size: int, flops: int) -> None:
    """Times a step of `size` images."""
    what = f"the whole step as a CUDA graph at batch {size}"
    if not context.enough(3, what):
        return
    try:
        prepared = prepare(context, "bf16", size)
        replay = record(prepared)
        timing = time_calls(replay, context.device, context.clock, seconds=context.sizes.seconds)
    except OutOfMemory:
        too_large(context, what)
        return
    except RuntimeError as error:  # an operation that cannot be recorded
        text = str(error).partition("\n")[0]
        context.found.cut(f"{what}: it cannot be recorded ({text})")
        free_memory(context.device)
        return
    tell_speed(context, "Training steps of TMGF as one CUDA graph", size, "bf16", timing, flops)


def record(prepared: Prepared) -> Callable[[], None]:
    """A function that replays a step in bf16: network, losses, backward, memory, optimizer."""
    network, criterion, batch = prepared.network, prepared.criterion, prepared.batch
    optimizer = prepared.trainer.optimization.optimizer

    def step() -> None:
        # Casts of the weights must be recorded, so autocast may not reuse earlier ones.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            embeddings = network(batch)
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
