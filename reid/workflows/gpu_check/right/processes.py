"""Compares two processes that share a device with one process."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from reid.workflows.gpu_check import parts
from reid.workflows.gpu_check.exact import exact_products
from reid.workflows.gpu_check.findings import Context
from reid.workflows.gpu_check.sizes import Sizes

_PROCESSES = 2
_STEPS = 3
_LIMIT = 1e-4


def run(context: Context) -> None:
    """Takes the same steps in one process and in two, over gloo, which accepts GPU tensors."""
    sizes, folder = context.sizes, Path(context.folder)
    start_processes(
        _work, (_PROCESSES, sizes, str(context.device), context.folder), _PROCESSES,
        start_method="spawn",
    )  # type: ignore[no-untyped-call]  # fmt: skip
    expected = _stepped(0, 1, sizes, context.device)
    context.found.check(
        "one process has trained", any(float(value.abs().max()) > 0 for value in expected.values()),
        f"{len(expected)} tensors, {_STEPS} steps",
    )  # fmt: skip
    for rank in range(_PROCESSES):
        seen = torch.load(folder / f"{rank}.pt", weights_only=True)
        errors = {
            name: float((seen[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
            for name, value in expected.items()
        }
        worst = max(errors, key=lambda name: errors[name])
        context.found.check(
            f"process {rank} of {_PROCESSES} on one device ends with what one process ends with, "
            f"to {_LIMIT:g}",
            seen.keys() == expected.keys() and errors[worst] <= _LIMIT,
            f"largest relative difference {errors[worst]:.1e}, of {worst}",
        )


def _work(rank: int, world: int, sizes: Sizes, device_name: str, folder: str) -> None:
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name may be unknown
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    torch.save(_stepped(rank, world, sizes, device), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _stepped(rank: int, world: int, sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Weights, statistics and memories after some steps with a share of each batch, on the CPU."""
    parts.import_parts()
    network = parts.make_network(sizes, device, depth=sizes.short_depth, drop_path=0.0)
    parts.share_statistics(network)
    labelled = parts.make_labelled(sizes.rows[0], 1 + network.num_parts, sizes.dim, device)
    criterion = parts.make_criterion([parts.TMGF_LOSS], network, labelled, device)
    trainer = parts.make_trainer(network, criterion, device, clip=1.0)
    with exact_products():
        for step in range(_STEPS):
            batch = parts.make_batch(labelled, sizes.small_batch, sizes.image, device, step)
            trainer.run_step(parts.share_of(batch, rank, world))
    state = {**trainer.model.state_dict(), **parts.memories(criterion)}
    return {name: value.float().cpu() for name, value in state.items()}
