"""Rank, world size and the few collectives that the parts need; one process needs no set-up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")

_control: Any = None
"""For `largest` and `gather_counts`; on CPUs, so that asking waits for no GPU. None: all are."""


def init_process_group(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Joins the processes that torchrun started; does nothing where it did not start this one."""
    global _control
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        if device.type == "cuda":
            _control = dist.new_group(backend="gloo", timeout=timeout)


def destroy_process_group() -> None:
    """Leaves the group, if there is one."""
    global _control
    _control = None
    if is_distributed():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def local_world_size() -> int:
    """How many processes train together on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Waits for every process."""
    if is_distributed():
        dist.barrier()


def broadcast_object(value: T | None) -> T:
    """The main process's `value`, on every process."""
    values = [value]
    if is_distributed():
        dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def broadcast_rows(rows: Tensor) -> Tensor:
    """The main process's `rows`, on every process; elsewhere only their shape and type count."""
    if not is_distributed():
        return rows
    through_gpu = dist.get_backend() == "nccl"
    sent = rows.cuda() if through_gpu else rows
    dist.broadcast(sent, src=0)
    return sent.to(rows.device)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Gives torch back the number of threads that it had, on which the last bits of a sum depend.

    Numba's OpenMP layer sets torch's number together with its own, so that an epoch would depend on
    whether numba had been at work in this process before.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def largest(*numbers: int) -> tuple[int, ...]:
    """The largest of each number over the processes, on every process; waits for no GPU."""
    if not is_distributed():
        return numbers
    found = torch.tensor(numbers)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return tuple(found.tolist())


def gather_counts(count: int) -> list[int]:
    """Every process's number in rank order, on every process; waits for no GPU."""
    if not is_distributed():
        return [count]
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(found, torch.tensor([count]), group=_control)
    return [int(number) for number in found]


def gather_objects(value: T) -> list[T]:
    """Every process's `value` in rank order, on every process."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (n, ...) of all processes in rank order, (sum n, ...), on every process.

    The numbers of rows may differ. The result carries no gradient.
    """
    if not is_distributed():
        return rows
    counts = gather_counts(len(rows))
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows (n, ...) of all processes in rank order, (sum n, ...), on every process.

    As `gather_rows`, but what every process does with the result flows back: the gradient of a
    process's own rows is the sum of those that the processes have for them.
    """
    if not is_distributed():
        return rows
    counts, own = gather_counts(len(rows)), rank()
    others = (0, 0) * (rows.ndim - 1) + (sum(counts[:own]), sum(counts[own + 1 :]))
    return sum_with_gradient(F.pad(rows, others))


def sum_with_gradient(value: Tensor) -> Tensor:
    """The sum of all processes' `value`, through which gradients flow back to each of them.

    Args:
        value: Of the same shape everywhere.
    """
    if not is_distributed():
        return value
    total: Tensor = _Sum.apply(value)
    return total


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is that of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_with_gradient(gradient)
