#!/usr/bin/env python
"""Times clustering on disk, step by step, alone or under torchrun; a share of it is enough.

Floor: the product of each pair of rows once, of the length that is multiplied, by all processes.
With `--share`, only so many of the rounds in which blocks are compared take place; their time is
divided by their share. The other steps go over all rows, once. Neighbours are then missed, so those
steps take what they should only if a person's images follow each other (`--order persons`).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floors import Floor, all_pairs, clock, same_threads
from measure import memory_of
from neighbors import features_of, fill_with_mixtures
from numpy.lib.format import open_memmap
from tabulate import tabulate

from reid import distributed
from reid.labelling import JaccardDBSCAN
from reid.neighbors.shards import Shards, ShardSettings, WorkFolder, cluster_in_shards
from reid.structures import ProgressBar

PER_PERSON, LATENT = 31, 64
BLOCK, INTERVAL = 32_768, 0.05
KINDS = "directions", "isotropic"
COMPARING = "Comparing pairs of blocks"


def write_features(path: Path, count: int, dim: int, kind: str, order: str) -> None:
    """Writes unit vectors of persons with 31 images each, block by block.

    Args:
        path: The .npy file.
        count: N.
        dim: D.
        kind: `directions`: most of them in 64 directions; `isotropic`: in all; or a file of
            tools/extract.py, of which mixtures are made, in a random order.
        order: `persons`: a person's images follow each other; `random`: in any order.
    """
    random = np.random.default_rng(0)
    if kind not in KINDS:
        real = features_of(kind)
        rows = open_memmap(path, "w+", np.float32, (count, real.shape[1]))
        fill_with_mixtures(rows, real, random, BLOCK)
        rows.flush()
        return
    width = LATENT if kind == "directions" else dim
    basis = random.standard_normal((LATENT, dim), np.float32) / LATENT**0.5
    spread, rest = (0.7, 0.5) if kind == "directions" else (1.6, 0.0)
    centres = random.standard_normal((max(count // PER_PERSON, 2), width), np.float32)
    rows = open_memmap(path, "w+", np.float32, (count, dim))
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        which = random.integers(len(centres), size=size)
        if order == "persons":
            which = np.arange(start, start + size) // PER_PERSON % len(centres)
        part = centres[which] + spread * random.standard_normal((size, width), np.float32)
        if kind == "directions":
            part = part @ basis + rest * random.standard_normal((size, dim), np.float32)
        rows[start : start + size] = part / np.linalg.norm(part, axis=1, keepdims=True)
    rows.flush()


@dataclass
class Meter:
    """Time and memory of each step of this process, in the place of a progress bar.

    Attributes:
        folder: Whose files are counted.
        steps: Title -> seconds, seconds by the floors' clock, MB of memory that is not of files at
            its peak, GB of files at the end.
    """

    folder: Path
    steps: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)

    @contextmanager
    def bar(self, title: str) -> Iterator[ProgressBar]:
        """Measures a step."""
        peak, ended = [memory_of("RssAnon")], threading.Event()

        def watch() -> None:
            while not ended.wait(INTERVAL):
                peak.append(memory_of("RssAnon"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        before = time.perf_counter(), clock()
        try:
            yield lambda done, total: None
        finally:
            seconds = time.perf_counter() - before[0], clock() - before[1]
            ended.set()
            watcher.join()
            files = [path.stat().st_blocks * 512 for path in self.folder.rglob("*.npy")]
            self.steps[title] = (*seconds, max(peak), sum(files) / 1e9)


def measured(path: Path, work_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Clusters the features; what each step took, over all processes."""
    rows = np.asarray(np.load(path, mmap_mode="c"))
    meter = Meter(work_dir)
    folder = WorkFolder(work_dir, distributed.rank())
    shards = Shards(folder, meter.bar, share=arguments.share)
    settings = ShardSettings(
        arguments.k1, arguments.k2, memory=1e9 * arguments.memory_gb,
        block_rows=arguments.block_rows, search=arguments.search,
    )  # fmt: skip
    labels = np.array(cluster_in_shards(shards, rows, settings))
    steps = []
    every = distributed.gather_objects(meter.steps)
    for title, (seconds, _, _, files) in meter.steps.items():
        share = arguments.share if title == COMPARING else 1.0
        if title == COMPARING:
            rounds = int(folder.done("plan")[0]["blocks"]) - 1
            share = sum(name.startswith("round-") for name in shards.seconds) / rounds
        taken = sum(other[title][1] for other in every) / len(every)
        peak = max(other[title][2] for other in every)
        steps.append((title, seconds, seconds / share, taken / share, peak, files))
    names = "centres", "plan", "sets", "means", "distances", "lists"
    facts = {step: folder.done(step) for step in names}
    plan = {"dims": 0, **facts["centres"].get(0, {}), **facts["plan"].get(0, {})}
    entries = {
        step: round(sum(facts_.get(name, 0) for facts_ in facts[step].values()) / len(rows), 3)
        for step, name in (("sets", "entries"), ("means", "entries"), ("distances", "entries"),
                           ("lists", "again"))
    }  # fmt: skip
    return {"steps": steps, "labels": labels, "plan": plan, "a_row": entries,
            "dim": rows.shape[1]}  # fmt: skip


def main() -> None:
    """Parses the arguments, clusters, prints a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument(
        "--kind", default="directions",
        help="directions, isotropic, or an .npz of tools/extract.py, of which mixtures are made",
    )  # fmt: skip
    parser.add_argument("--order", choices=("persons", "random"), default="random")
    parser.add_argument("--k1", type=int, default=30)
    parser.add_argument("--k2", type=int, default=6)
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds of comparisons")
    parser.add_argument("--search", choices=("exact", "ivf"), default="exact")
    parser.add_argument("--memory-gb", type=float, default=1.0, help="for candidates, a process")
    parser.add_argument("--block-rows", type=int, help="most rows of a block")
    parser.add_argument("--work-dir", type=Path, default=Path("shards"), help="an empty folder")
    parser.add_argument("--compare", action="store_true", help="with the clustering in memory")
    arguments = parser.parse_args()
    distributed.init_process_group(torch.device("cpu"), timedelta(days=30))
    same_threads()
    processes, main_process = distributed.world_size(), distributed.is_main()
    path, work_dir = arguments.work_dir / "features.npy", arguments.work_dir / "work"
    if main_process:
        work_dir.mkdir(parents=True)
        write_features(path, arguments.images, arguments.dim, arguments.kind, arguments.order)
    distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    found = measured(path, work_dir, arguments)
    dims = int(found["plan"]["dims"])
    width = dims + 1 if dims else found["dim"]
    distributed.barrier()
    products = all_pairs(arguments.images, width)["products"] / processes
    products = sum(distributed.gather_objects(products)) / processes
    if main_process:
        floor = Floor({"products": products}, sum(step[3] for step in found["steps"]))
        told(arguments, found, floor, path, width)
    distributed.destroy_process_group()


def told(
    arguments: argparse.Namespace, found: dict[str, Any], floor: Floor, path: Path, width: int
) -> None:
    """Prints the table and the JSON object."""
    agrees, baseline = None, None
    if arguments.compare:
        rows, start = torch.from_numpy(np.load(path)), time.perf_counter()
        clusterer = JaccardDBSCAN(arguments.k1, arguments.k2, search=arguments.search)
        expected = clusterer.find_clusters(rows, None).numpy()
        baseline = round(time.perf_counter() - start, 2)
        agrees = bool((expected == found["labels"]).all())
    processes, labels = distributed.world_size(), found["labels"]
    headers = ("step", "seconds", "of the whole", "by the floor's clock", "MB of a process",
               "GB on disk")  # fmt: skip
    table = [
        (title, f"{seconds:.1f}", f"{whole:.1f}", f"{taken:.1f}", f"{peak:,.0f}", f"{files:.2f}")
        for title, seconds, whole, taken, peak, files in found["steps"]
    ]
    line = {
        "stage": "shards", "size": f"{arguments.images:,} x {found['dim']}",
        "kind": arguments.kind if arguments.kind in KINDS else "file", "search": arguments.search,
        "order": arguments.order, "k1": arguments.k1, "k2": arguments.k2,
        "processes": processes, "threads": torch.get_num_threads(), "share": arguments.share,
        "visits": found["plan"].get("visits", 0), "lists": found["plan"].get("lists", 0),
        "blocks": found["plan"]["blocks"], "room": found["plan"]["room"], "width": width,
        "seconds": round(sum(step[2] for step in found["steps"]), 2),
        "peak_mb": round(max(step[4] for step in found["steps"])),
        "disk_gb": round(max(step[5] for step in found["steps"]), 3),
        "entries_of_a_row": found["a_row"], "clusters": int(labels.max()) + 1,
        "outliers": int((labels < 0).sum()), "seconds_in_memory": baseline, "agrees": agrees,
        **floor.facts(),
    }  # fmt: skip
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, {processes} processes of "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"{tabulate(table, headers, disable_numparse=True)}\n{json.dumps(line)}\n"
    )


if __name__ == "__main__":
    main()
