"""What the processes of a test run; a module, because a process must find it by its name."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def work_as_rank(rank: int, folder: str, work: Callable[[int, int], Any]) -> None:
    """One of two processes; stores what `work` returns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def train_as_rank(rank: int, world: dict[str, str], arguments: list[str], log: str) -> None:
    """One process of a run, with the environment that torchrun would give it."""
    descriptor = os.open(f"{log}.{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(world)
    if int(world["WORLD_SIZE"]) > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    else:
        del os.environ["WORLD_SIZE"]
    torch.set_num_threads(1)
    os.chdir(Path(__file__).parents[2])
    sys.argv = ["tools/train_net.py", *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
