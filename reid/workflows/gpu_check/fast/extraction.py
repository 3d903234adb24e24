"""Extraction of features from images in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.fast.step import OutOfMemory, tell_speed, too_large
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory, time_calls

_BATCHES = 4
_PRECISIONS: tuple[parts.Precision, ...] = ("fp16", "bf16", "fp32")


def run(context: Context) -> None:
    """Extracts batches from the host's page-locked memory, where a loader puts them."""
    parts.import_parts()
    sizes, device = context.sizes, context.device
    network = parts.make_network(sizes, device)
    labelled = parts.make_labelled(
        _BATCHES * sizes.test_batch, 1 + network.num_parts, sizes.dim, torch.device("cpu")
    )
    records = parts.image_records(labelled)
    batches = host_batches(labelled, sizes.test_batch, sizes.image, device)
    flops = forward_flops(network, batches[0], device)
    height, width = sizes.image
    for precision in _PRECISIONS:
        if not context.enough(sizes.seconds, precision):
            continue
        free_memory(device)
        try:
            timing = time_calls(
                lambda: parts.extract(network, batches, records, device, precision),  # noqa: B023
                device, context.clock, seconds=sizes.seconds, warm_up=1,
            )  # fmt: skip
        except OutOfMemory:
            too_large(context, precision)
            continue
        title = f"Extraction with TMGF at {height}x{width}, batches of {sizes.test_batch} in memory"
        tell_speed(context, title, len(records), precision, timing, flops)
        context.found.number(f"images_s_{precision}", len(records) / timing.seconds)


def host_batches(
    labelled: parts.Labelled, size: int, image: tuple[int, int], device: torch.device
) -> list[parts.Batch]:
    """Batches of random images on the host, in page-locked memory where `device` is a GPU."""
    generator = torch.Generator().manual_seed(4000)
    pixels = torch.randn(size, 3, *image, generator=generator)
    found = []
    for start in range(0, len(labelled.camids), size):
        index = torch.arange(start, min(start + size, len(labelled.camids)))
        batch = parts.as_batch(pixels[: len(index)], labelled.camids[index], index)
        found.append(parts.pinned(batch) if device.type == "cuda" else batch)
    return found


def forward_flops(network: torch.nn.Module, batch: parts.Batch, device: torch.device) -> int:
    """Floating point operations of the network for an image, forward only."""
    few = parts.share_of(batch, 0, max(len(batch.index) // 4, 1)).to(device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        seen: Tensor = parts.banks_of(parts.forward(network.eval(), few))
    return int(counter.get_total_flops()) // seen.shape[1]
