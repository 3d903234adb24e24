"""Rank, world size and the few collectives that the parts need; one process needs no set-up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from reid.structures import ProgressBar

T = TypeVar("T")

_control: Any = None
"""A gloo group for `largest` and `gather_counts`, so that these never synchronise a GPU; None: the
default group is gloo."""


def init_process_group(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Joins the processes that torchrun started; does nothing if this one was started alone."""
    global _control
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        if device.type == "cuda":
            _control = dist.new_group(backend="gloo", timeout=timeout)


def is_started_beside_main() -> bool:
    """Whether torchrun has started this process as another than the main one of its group.

    Known before the group is joined. A `RANK` alone, as launchers of other programs leave it in
    their environment, says nothing.
    """
    return "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"


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
    """The main process's `rows`, on every process; those of others give shape and type only."""
    if not is_distributed():
        return rows
    through_gpu = dist.get_backend() == "nccl"
    sent = rows.cuda() if through_gpu else rows
    dist.broadcast(sent, src=0)
    return sent.to(rows.device)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restores torch's number of threads at the end of the block.

    Numba's OpenMP layer sets torch's number of threads together with its own. The last bits of a
    sum depend on that number: without this, an epoch would depend on whether numba ran before it.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def largest(*numbers: int) -> tuple[int, ...]:
    """The largest of each number over the processes, on every process; never synchronises a GPU."""
    if not is_distributed():
        return numbers
    maximum = torch.tensor(numbers)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=_control)
    return tuple(maximum.tolist())


def main_number(number: int) -> int:
    """The main process's number, 0 or more, on every process; never synchronises a GPU."""
    return gather_counts(number)[0]


def gather_counts(count: int) -> list[int]:
    """Every process's number in rank order, on every process; never synchronises a GPU."""
    if not is_distributed():
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([count]), group=_control)
    return [int(number) for number in counts]


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

    Like `gather_rows`, but with gradients: the rows of a process get the sum of the gradients that
    all processes have for them.
    """
    if not is_distributed():
        return rows
    counts, number = gather_counts(len(rows)), rank()
    before, behind = sum(counts[:number]), sum(counts[number + 1 :])
    return sum_with_gradient(F.pad(rows, (0, 0) * (rows.ndim - 1) + (before, behind)))


def sum_with_gradient(value: Tensor) -> Tensor:
    """The sum of all processes' `value`, through which gradients flow back to each of them.

    Args:
        value: Of the same shape everywhere.
    """
    if not is_distributed():
        return value
    total: Tensor = _Sum.apply(value)
    return total


class PartError(RuntimeError):
    """A process failed in its part of `run_together`."""


Part = Callable[[Tensor, ProgressBar | None], T]
"""What each process does with the rows; only the main process gets a progress bar."""


@dataclass(frozen=True)
class _Call(Generic[T]):
    """What the other processes are to run, and the shape of the rows that follow."""

    part: Part[T]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """How the main process's work ended."""

    value: T | None
    error: Exception | None


@dataclass(frozen=True)
class _Failure:
    """The text of an error in a process's part."""

    message: str


_others_wait = ContextVar("others_wait", default=False)


def others_wait() -> bool:
    """Whether the other processes wait in `run_on_main`, ready for `run_together`."""
    return _others_wait.get()


def run_on_main(work: Callable[[], T]) -> T:
    """Runs `work` on the main process; the others wait, and take their parts of `run_together`.

    Every process must call it.

    Returns:
        What `work` returned on the main process, on every process; must be picklable.

    Raises:
        Exception: What `work` raised on the main process, on every process.
    """
    if not is_distributed():
        return work()
    outcome: _Call[Any] | _Outcome[T]
    if not is_main():
        while isinstance(outcome := broadcast_object(None), _Call):
            with contextlib.suppress(PartError):  # the main process reports its own outcome
                _take_part(outcome, torch.empty(outcome.shape, dtype=outcome.dtype), None)
    else:
        token = _others_wait.set(True)
        try:
            outcome = _Outcome(work(), None)
        except Exception as error:  # noqa: BLE001 - raised below, on every process
            outcome = _Outcome(None, error)
        finally:
            _others_wait.reset(token)
        broadcast_object(outcome)
    if outcome.error is not None:
        raise outcome.error
    return outcome.value  # type: ignore[return-value]


def run_together(part: Part[T], rows: Tensor, progress: ProgressBar | None = None) -> list[T]:
    """Runs `part` on every process; only the main one calls this, inside `run_on_main`.

    Args:
        part: Called with the rows; must be picklable, and so must what it returns.
        rows: (N, ...) of the main process. They are sent raw: a million vectors are gigabytes,
            which pickling would double.
        progress: Follows the main process's part.

    Returns:
        What the processes returned, in rank order.

    Raises:
        PartError: Some process failed.
    """
    call = _Call(part, tuple(rows.shape), rows.dtype)
    broadcast_object(call)
    return _take_part(call, rows, progress)


def _take_part(call: _Call[T], rows: Tensor, progress: ProgressBar | None) -> list[T]:
    rows = broadcast_rows(rows)
    result: T | _Failure
    try:
        result = call.part(rows, progress)
    except Exception as error:  # noqa: BLE001 - told to every process
        result = _Failure(f"process {rank()}: {type(error).__name__}: {error}")
    results: list[T] = []
    for other in gather_objects(result):
        if isinstance(other, _Failure):
            raise PartError(other.message)
        results.append(other)
    return results


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_with_gradient(gradient)
