"""An exact neighbour search, shared among processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numba
import numpy as np
import torch
from torch import Tensor

from reid import distributed
from reid.neighbors.exact import SearchTask, neighbors_of
from reid.neighbors.kernels import Indices
from reid.structures import ProgressBar


class SearchError(RuntimeError):
    """A process failed in its part of a search."""


def search_together(task: SearchTask, progress: ProgressBar | None) -> Indices:
    """The neighbour lists (N, k); the main process calls this in `distributed.run_on_main`.

    Of R processes, process r searches and certifies the rows from N r / R to N (r + 1) / R; the
    main process gets all lists. They equal those of a search by one process, bit for bit.

    Two rows of different processes are multiplied by both processes. So two processes save a
    quarter of the time that one process needs for multiplications, and eight save three quarters.

    Raises:
        SearchError: Some process failed.
    """
    part = _Part(replace(task, rows=task.rows[:0]))
    try:
        return np.concatenate(distributed.run_together(part, torch.from_numpy(task.rows), progress))
    except distributed.PartError as error:
        raise SearchError(f"neighbour search of {error}") from error


@dataclass(frozen=True)
class _Part:
    """The search of one process for its share of the rows; processes share a machine's threads.

    Attributes:
        task: The search without its vectors.
    """

    task: SearchTask

    def __call__(self, rows: Tensor, progress: ProgressBar | None) -> Indices:
        """The neighbour lists (n, k) of this process's share of the vectors (N, D)."""
        count, rank, world = len(rows), distributed.rank(), distributed.world_size()
        first, last = count * rank // world, count * (rank + 1) // world
        threads = numba.get_num_threads()
        try:
            numba.set_num_threads(max(1, threads // distributed.local_world_size()))
            return neighbors_of(replace(self.task, rows=rows.numpy()), first, last, progress)
        finally:
            numba.set_num_threads(threads)
