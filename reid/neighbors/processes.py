"""Several processes that share the neighbour searches of the main one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numba
import numpy as np
import torch

from reid import distributed
from reid.neighbors.exact import SearchTask, neighbors_of
from reid.neighbors.kernels import Floats, Indices
from reid.structures import ProgressBar

T = TypeVar("T")
helped = ContextVar("helped", default=False)
"""Whether the other processes wait for searches of this one."""


@dataclass(frozen=True)
class _Call:
    """A search to take part in: its arguments without the vectors, and the vectors' (N, D)."""

    task: SearchTask
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """How the main process's work ended."""

    value: T | None
    error: Exception | None


class SearchError(RuntimeError):
    """A process failed in its part of a search."""


def run_on_main(work: Callable[[], T]) -> T:
    """Runs `work` on the main process; the others take their parts of its neighbour searches.

    Every process must call it. While the main process works, each `nearest_neighbors` in it sends
    its vectors to the others; the process of number r searches and certifies the rows from
    N r / R to N (r + 1) / R, R processes in all, and the main process gets all lists. They are
    those that it would have found alone, bit for bit. Everything else is done once, and what
    searches no neighbours needs to know nothing of this.

    Two rows of different processes are multiplied by both of them, so that two processes save a
    quarter of the multiplications that one would wait for, and eight three quarters.

    Returns:
        What `work` returned on the main process, on every process; must be picklable.

    Raises:
        Exception: What `work` raised on the main process, on every process.
    """
    if not distributed.is_distributed():
        return work()
    outcome: _Call | _Outcome[T]
    if not distributed.is_main():
        while isinstance(outcome := distributed.broadcast_object(None), _Call):
            with contextlib.suppress(SearchError):  # the main process tells how it ends
                _search_own_part(outcome, None, None)
    else:
        token = helped.set(True)
        try:
            outcome = _Outcome(work(), None)
        except Exception as error:  # noqa: BLE001 - raised below, on every process
            outcome = _Outcome(None, error)
        finally:
            helped.reset(token)
        distributed.broadcast_object(outcome)
    if outcome.error is not None:
        raise outcome.error
    return outcome.value  # type: ignore[return-value]


def search_together(task: SearchTask, progress: ProgressBar | None) -> Indices:
    """(N, k) lists of a search of the main process in `run_on_main`, with the others' help.

    Raises:
        SearchError: Some process failed; every process raises it.
    """
    call = _Call(replace(task, rows=task.rows[:0]), task.rows.shape)
    distributed.broadcast_object(call)
    return _search_own_part(call, task.rows, progress)


def _search_own_part(call: _Call, rows: Floats | None, progress: ProgressBar | None) -> Indices:
    """(N, k) lists, those of this process's rows found here and the others by the others.

    The processes of a machine share its threads.
    """
    count, rank, world = call.shape[0], distributed.rank(), distributed.world_size()
    threads = numba.get_num_threads()
    found: Indices | str
    # raw, since a million vectors are gigabytes, which pickling would double
    own = np.empty(call.shape, np.float32) if rows is None else rows
    own = distributed.broadcast_rows(torch.from_numpy(own)).numpy()
    try:
        numba.set_num_threads(max(1, threads // distributed.local_world_size()))
        first, last = count * rank // world, count * (rank + 1) // world
        found = neighbors_of(replace(call.task, rows=own), first, last, progress)
    except Exception as error:  # noqa: BLE001 - told to every process
        found = f"neighbour search of process {rank}: {type(error).__name__}: {error}"
    finally:
        numba.set_num_threads(threads)
    parts = distributed.gather_objects(found)
    for part in parts:
        if isinstance(part, str):
            raise SearchError(part)
    return np.concatenate(parts)
