#!/usr/bin/env python
"""Times galleries of many crops: building, opening, answering, for each kind of index.

Floors: of the answers, the product of queries and gallery, 2 Q N D FLOPs in fp32, and of a single
query, reading all features in memory once; an index looks at fewer and can be below these. Of
opening, reading the file's bytes once. Of writing, a plain write of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from floors import Floor, all_compared, clock, read_speed
from measure import measure
from tabulate import tabulate

from reid.workflows.search.gallery import (
    HASH_BYTES,
    Entries,
    Gallery,
    Origin,
    read_gallery,
    write_gallery,
)
from reid.workflows.search.query import QuerySettings, find
from reid.workflows.search.upkeep import with_index

PER_PERSON, LATENT = 20, 64
BLOCK = 50_000
PIECE = 2**26  # bytes


def make_features(count: int, dim: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """(N, D) unit vectors of persons with 20 images each, most of it in 64 directions.

    Gallery (seed 1) and queries (seed 2) are of the same persons.
    """
    person = np.random.default_rng(0)
    basis = person.standard_normal((LATENT, dim), np.float32) / LATENT**0.5
    centres = person.standard_normal((max(1, count // PER_PERSON), LATENT), np.float32)
    generator = np.random.default_rng(seed)
    features = np.empty((count, dim), np.float32)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        which = generator.integers(len(centres), size=stop - start)
        latent = centres[which] + 0.7 * generator.standard_normal(
            (stop - start, LATENT), np.float32
        )
        block = latent @ basis
        block += 0.5 * generator.standard_normal(block.shape, np.float32)
        features[start:stop] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return features


def make_entries(count: int, dim: int, kind: str, folder: str) -> tuple[Entries, str, str]:
    """What a gallery is built from."""
    paths = [f"/crops/camera{row % 6}/{row:08d}.jpg" for row in range(count)]
    cameras = [f"camera{row % 6}" for row in range(count)]
    hashes = np.random.default_rng(3).integers(0, 256, (count, HASH_BYTES), np.uint8)
    return Entries(make_features(count, dim), paths, cameras, hashes), kind, folder


def build(made: tuple[Entries, Any, str]) -> dict[str, Any]:
    """Builds a gallery, measures its recall, writes it."""
    entries, kind, folder = made
    start = time.perf_counter()
    gallery = with_index(Gallery.of(entries, Origin("made")), kind)
    built = time.perf_counter()
    write_gallery(Path(folder), gallery)
    written = time.perf_counter()
    size = (Path(folder) / "gallery.safetensors").stat().st_size
    with (Path(folder) / "plain").open("wb") as file:
        for first in range(0, size, PIECE):
            file.write(bytes(min(PIECE, size - first)))
        file.flush()
        os.fsync(file.fileno())
    plain = time.perf_counter() - written
    (Path(folder) / "plain").unlink()
    return {
        "build_s": built - start,
        "write_s": written - built,
        "write_over_floor": (written - built) / plain,
        "file_mb": size / 2**20,
        "note": asdict(gallery.note),
    }


def make_queries(count: int, dim: int, images: int, folder: str) -> tuple[Entries, str]:
    """New images of persons in the gallery."""
    features = make_features(images, dim, seed=2)[:: max(1, images // count)][:count].copy()
    paths = [f"/queries/{row}.jpg" for row in range(count)]
    hashes = np.zeros((count, HASH_BYTES), np.uint8)
    return Entries(features, paths, [""] * count, hashes), folder


def answer(made: tuple[Entries, str]) -> dict[str, Any]:
    """Opens a gallery; asks all queries together, then ten one by one."""
    queries, folder = made
    since = clock()
    with (Path(folder) / "gallery.safetensors").open("rb") as file:
        while file.read(PIECE):
            pass
    reading = clock() - since
    start, since = time.perf_counter(), clock()
    gallery = read_gallery(Path(folder))
    index = gallery.index()
    opened, opening = time.perf_counter(), clock() - since
    since = clock()
    lines = find(gallery, index, queries, QuerySettings())
    together, answering = time.perf_counter(), clock() - since
    since = clock()
    for row in range(10):
        one = Entries(queries.features[row : row + 1], queries.paths[row : row + 1], [""],
                      queries.hashes[row : row + 1])  # fmt: skip
        find(gallery, index, one, QuerySettings())
    single, ended = (clock() - since) / 10, time.perf_counter()
    shape = gallery.features.shape
    floors = {
        "open_": Floor({"reading": reading}, opening),
        "": Floor(all_compared(len(queries.features), *shape), answering),
        "one_": Floor({"reading": 4 * shape[0] * shape[1] / read_speed(PIECE)}, single),
    }
    return {
        **{
            f"{name}{key}": value
            for name, floor in floors.items()
            for key, value in floor.facts().items()
        },
        "open_s": opened - start,
        "answers_per_s": len(lines) / (together - opened),
        "one_s": (ended - together) / 10,
        "rows": [[row for row, _, _ in line] for line in lines],
    }


def main() -> None:
    """Parses the arguments, measures each kind, prints a line for each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", default=["exact", "ivfpq", "hnsw"])
    arguments = parser.parse_args()
    table, exact = [], None
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            made = measure(build, make_entries, arguments.images, arguments.dim, kind, folder)
            asked = measure(
                answer, make_queries, arguments.queries, arguments.dim, arguments.images, folder
            )
        found = asked.result.pop("rows")
        exact = found if kind == "exact" else exact
        line = {**made.result, **asked.result, "build_extra_mb": made.extra_mb,
                "query_extra_mb": asked.extra_mb}  # fmt: skip
        if exact is not None:
            common = [len({*a} & {*b}) for a, b in zip(exact, found, strict=True)]
            line["recall_of_queries"] = sum(common) / sum(map(len, exact))
        sys.stdout.write(json.dumps({"kind": kind, **line}) + "\n")
        sys.stdout.flush()
        table.append([
            kind, f"{line['build_s']:.0f}", f"{line['build_extra_mb']:,.0f}",
            f"{line['file_mb']:,.0f}", f"{line['open_s']:.1f}", f"{line['query_extra_mb']:,.0f}",
            f"{line['answers_per_s']:.0f}", f"{1000 * line['one_s']:.0f}",
            f"{line.get('recall_of_queries', 1):.3f}",
            *(f"{line[f'{name}over_floor']:.2f}" for name in ("", "one_", "open_", "write_")),
        ])  # fmt: skip
    headers = (
        "index", "build s", "MB above the features", "file MB", "open s", "MB to query",
        "answers/s", "one query ms", "recall@10",
        "over_floor: answers", "one query", "open", "write",
    )  # fmt: skip
    size = f"{arguments.images:,} x {arguments.dim}, {os.cpu_count()} CPUs, {platform.machine()}"
    sys.stdout.write(f"{size}\n{tabulate(table, headers, disable_numparse=True)}\n")


if __name__ == "__main__":
    main()
