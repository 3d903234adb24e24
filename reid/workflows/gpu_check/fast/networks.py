"""Training and extraction with other networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.fast.extraction import forward_flops, host_batches
from reid.workflows.gpu_check.fast.step import OutOfMemory, tell_speed, too_large
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.timing import free_memory, step_flops, time_calls

_LOSS = {"name": "ClusterContrastLoss"}
_BATCHES = 4


def run(context: Context) -> None:
    """Times Cluster Contrast's step and extraction with each network, in bf16."""
    parts.import_parts()
    for name, backbone, image in _networks(context):
        if not context.enough(3 * context.sizes.seconds, name):
            continue
        try:
            _measure(context, name, backbone, image)
        except OutOfMemory:
            too_large(context, name)


def _networks(context: Context) -> Iterator[tuple[str, Mapping[str, Any], tuple[int, int]]]:
    sizes = context.sizes
    for name, kind in sizes.networks:
        image = sizes.image_conv if kind == "conv" else sizes.image
        yield name, {"name": "TimmBackbone", "model": name}, image
    if parts.has_backbone("OSNet"):
        width = sizes.osnet_width
        yield f"OSNet x{width}", {"name": "OSNet", "width": width}, sizes.image_conv
    else:
        context.found.cut("OSNet: no backbone of that name is registered")


def _measure(
    context: Context, name: str, backbone: Mapping[str, Any], image: tuple[int, int]
) -> None:
    network = parts.make_other_network(backbone, image, context.device)
    _train(context, name, network, image)
    _extract(context, name, network, image)


def _train(context: Context, name: str, network: parts.ReIDModel, image: tuple[int, int]) -> None:
    sizes, device = context.sizes, context.device
    free_memory(device)
    labelled = parts.make_labelled(sizes.rows[0], 1, network.embed_dim, device)
    criterion = parts.make_criterion([_LOSS], network, labelled, device)
    batch = parts.make_batch(labelled, 2 * sizes.small_batch, image, device)
    few = parts.share_of(batch, 0, max(len(batch.index) // 4, 1))

    def forward() -> Tensor:
        return parts.banks_of(parts.forward(network.train(), few)).sum()

    flops = step_flops(network, forward) // len(few.index)
    trainer = parts.make_trainer(network, criterion, device, amp="bf16")
    timing = time_calls(
        lambda: trainer.run_step(batch), device, context.clock, seconds=sizes.seconds
    )
    tell_speed(
        context, "Training steps with other networks", len(batch.index), "bf16", timing, flops,
        network=name, image=f"{image[0]}x{image[1]}",
    )  # fmt: skip


def _extract(context: Context, name: str, network: parts.ReIDModel, image: tuple[int, int]) -> None:
    sizes, device = context.sizes, context.device
    free_memory(device)
    images = parts.make_labelled(
        _BATCHES * sizes.test_batch, 1, network.embed_dim, torch.device("cpu")
    )
    batches = host_batches(images, sizes.test_batch, image, device)
    flops = forward_flops(network, batches[0], device)
    records = parts.image_records(images)
    timing = time_calls(
        lambda: parts.extract(network, batches, records, device, "bf16"), device, context.clock,
        seconds=sizes.seconds, warm_up=1,
    )  # fmt: skip
    tell_speed(
        context, "Extraction with other networks", len(records), "bf16", timing, flops,
        network=name, image=f"{image[0]}x{image[1]}",
    )  # fmt: skip
