"""A training step of TMGF that several sections measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import Timing, free_memory, step_flops

PRECISIONS: dict[str, parts.Amp] = {"fp16": "fp16", "bf16": "bf16", "fp32": "off"}


@dataclass(frozen=True)
class Prepared:
    """Everything that a step needs, on the device."""

    network: parts.ReIDModel
    criterion: parts.Criterion
    trainer: parts.Trainer
    labelled: parts.Labelled
    batch: parts.Batch


def prepare(context: Context, amp: parts.Amp, batch: int, *, drop_path: float = 0.1) -> Prepared:
    """Makes a network with new weights, TMGF's losses with the smaller memory, and a batch."""
    sizes, device = context.sizes, context.device
    free_memory(device)
    network = parts.make_network(sizes, device, drop_path=drop_path)
    labelled = parts.make_labelled(sizes.rows[0], 1 + network.num_parts, sizes.dim, device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
    trainer = parts.make_trainer(network, criterion, device, amp=amp)
    return Prepared(
        network, criterion, trainer, labelled,
        parts.make_batch(labelled, batch, sizes.image, device),
    )  # fmt: skip


def flops_per_image(context: Context) -> int:
    """Floating point operations of the network, forward and backward, for an image."""
    prepared = prepare(context, "off", 4)

    def forward() -> Tensor:
        return parts.banks_of(parts.forward(prepared.network, prepared.batch)).sum()

    return step_flops(prepared.network, forward) // len(prepared.batch.index)


def tell_speed(
    context: Context,
    table: str,
    images: int,
    precision: str,
    timing: Timing,
    flops: int,
    **more: str | float | None,
) -> float | None:
    """Adds a row with images and operations per second; returns the share of the matrix product.

    Args:
        context: The section's input.
        table: The table's title.
        images: Images per call.
        precision: `fp16`, `bf16` or `fp32`.
        timing: The time of a call.
        flops: Floating point operations per image.
        **more: Columns before the others.
    """
    rate = images * flops / timing.seconds / 1e12
    limit = context.number("limits", f"tflops_{precision}")
    share = rate / limit if limit else None
    context.found.row(
        table,
        **more,
        batch=images,
        precision=precision,
        images_per_s=images / timing.seconds,
        ms=1e3 * timing.seconds,
        lowest_to_highest=timing.spread,
        TFLOP_per_s=rate,
        of_the_product=None if share is None else f"{share:.1%}",
        peak_MB=timing.peak_mb,
    )
    return share


def too_large(context: Context, what: str) -> None:
    """Reports that something does not fit into the device's memory, and frees the memory."""
    free_memory(context.device)
    context.found.cut(f"{what}: it does not fit into the device's memory")


OutOfMemory = torch.OutOfMemoryError
