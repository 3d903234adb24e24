"""The neighbour search on several processes, and its end by Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

from reid import distributed
from reid.labelling import Clusterer, ClusteringError, JaccardDBSCAN, KMeans
from reid.neighbors import exact, nearest_neighbors, processes
from reid.structures import FeatureSet

COUNTS = (301, 2, 1)


def feature_set(count: int) -> FeatureSet:
    """Groups, and 90 vectors that need all precisions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 24, generator=generator)
    rows = centres[torch.arange(count) % 20] + 0.5 * torch.randn(count, 24, generator=generator)
    near = min(90, count // 3)
    rows[:near] = rows[:1] + 3e-5 * torch.randn(near, 24, generator=generator)
    return FeatureSet.of(F.normalize(rows, dim=1))


def clusterers(count: int) -> list[Clusterer]:
    return [
        JaccardDBSCAN(k1=10, min_samples=1),
        KMeans(num_clusters=min(count, 5)),
    ]


def results() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for count in COUNTS:
        features = feature_set(count)
        if not distributed.is_main():  # the main process's features count
            features = FeatureSet.of(features.test + 1)
        for half in (False, True):
            for block_size in (40, 2048):
                name = f"{count} lists, half={half}, blocks of {block_size}"
                found[name] = distributed.run_on_main(
                    lambda rows=features.test, size=block_size, half=half: torch.from_numpy(
                        nearest_neighbors(
                            rows, min(15, len(rows)), block_size=size, half_precision=half
                        )
                    )
                )
        for number, clusterer in enumerate(clusterers(count)):
            found[f"{count} labels {number}"] = distributed.run_on_main(
                lambda clusterer=clusterer, features=features: clusterer(features).cluster
            )
    return found


def error_of(work: Any) -> str:
    try:
        distributed.run_on_main(work)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def process(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    features = feature_set(40)
    errors = [
        error_of(lambda: JaccardDBSCAN(eps=0.01, min_samples=39)(features)),
        error_of(lambda: nearest_neighbors(features.test, 41)),
        error_of(lambda: KMeans(50)(features)),
    ]
    alone, searched = processes.neighbors_of, []

    def search(task: Any, first: int, last: int, progress: Any) -> Any:
        searched.append((first, last))
        if rank == world_size - 1:
            raise MemoryError("too much")
        return alone(task, first, last, progress)

    processes.neighbors_of = search
    errors.append(error_of(lambda: nearest_neighbors(features.test, 5)))
    processes.neighbors_of = alone
    torch.save(
        {"results": results(), "errors": errors, "searched": searched}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_give_the_lists_of_one(world_size: int, tmp_path: Path) -> None:
    start_processes(
        process, (world_size, str(tmp_path)), nprocs=world_size, start_method="forkserver"
    )
    expected = results()
    messages = [
        f"{ClusteringError.__name__}: no cluster among 40 images",
        "ValueError: k: expected 1 to the number of vectors, 40, got 41",
        f"{ClusteringError.__name__}: 40 images are too few for 50 clusters",
        f"SearchError: neighbour search of process {world_size - 1}: MemoryError: too much",
    ]
    for rank in range(world_size):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert saved["results"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(saved["results"][name], value), name
        for message, start in zip(saved["errors"], messages, strict=True):
            assert message.startswith(start)
        edges = (40 * rank // world_size, 40 * (rank + 1) // world_size)
        assert saved["searched"] == [edges]


@pytest.mark.parametrize("half", [False, True])
def test_part_of_the_rows(half: bool) -> None:
    rows = feature_set(301).test.numpy()
    task = exact.SearchTask(rows, 7, 40, half, "cpu")
    whole = exact.neighbors_of(task, 0, 301, None)
    for first, last in ((0, 100), (100, 200), (17, 18), (250, 301), (9, 9)):
        done = [(0, 0)]
        part = exact.neighbors_of(
            task, first, last, lambda count, total, done=done: done.append((count, total))
        )
        assert np.array_equal(part, whole[first:last])
        assert done[-1] == ((301, 301) if last > first else (0, 0))


WORK = """
import torch
from reid.neighbors import jaccard_distance
torch.manual_seed(0)
jaccard_distance(torch.nn.functional.normalize(torch.randn(500, 64), dim=1))  # compiles
rows = torch.nn.functional.normalize(torch.randn(150_000, 256), dim=1)
print("started", flush=True)
jaccard_distance(rows)
print("finished", flush=True)
"""


def test_ctrl_c_ends_the_search() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORK],
        cwd=Path(exact.__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "started\n"
            time.sleep(1)
            assert child.poll() is None  # it is still at work
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=60)  # the search would take minutes
        finally:
            child.kill()
    assert out == ""
    assert "KeyboardInterrupt" in err
    assert child.returncode == -signal.SIGINT
