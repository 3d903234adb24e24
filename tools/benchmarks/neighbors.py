#!/usr/bin/env python
"""Times the exact neighbour search with and without projected rows, and the products alone."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from typing import Any

import numpy as np
import torch
from measure import measure
from search import make_features
from tabulate import tabulate
from torch import Tensor

from reid.instructions import fast_bfloat16
from reid.neighbors import exact, nearest_neighbors
from reid.neighbors.plan import Plan

K, BLOCK = 20, 50_000


def make_rows(kind: str, count: int, dim: int, dims: int | None) -> tuple[Tensor, int | None]:
    """Unit vectors of a kind: `directions`, `isotropic`, or the file of features to take."""
    if kind == "directions":
        return torch.from_numpy(make_features(count, dim)), dims
    generator = np.random.default_rng(0)
    if kind != "isotropic":
        real = features_of(kind)
        if count <= len(real):
            return torch.from_numpy(real[generator.permutation(len(real))[:count]]), dims
        rows = np.empty((count, real.shape[1]), np.float32)
        fill_with_mixtures(rows, real, generator, BLOCK)
        return torch.from_numpy(rows), dims
    rows = np.empty((count, dim), np.float32)
    for start in range(0, count, BLOCK):
        part = rows[start : start + BLOCK]
        part[:] = generator.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return torch.from_numpy(rows), dims


def features_of(path: str) -> Any:
    """The features (N, D) of a file of tools/extract.py, as unit vectors."""
    real = np.load(path)["features"].astype(np.float32)
    return real / np.linalg.norm(real, axis=1, keepdims=True)


def fill_with_mixtures(rows: Any, real: Any, generator: np.random.Generator, block: int) -> None:
    """Fills `rows` (N, D) with unit mixtures of real features, block by block."""
    near = nearest_neighbors(torch.from_numpy(real), 21)[:, 1:]
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        part[:] = mixtures(real, near, len(part), generator)
        part /= np.linalg.norm(part, axis=1, keepdims=True)


def width_of(kind: str, dim: int) -> int:
    """Numbers of a row: `dim` where rows are drawn, or else those of the file."""
    return dim if kind in ("directions", "isotropic") else int(np.load(kind)["features"].shape[1])


def mixtures(real: Any, near: Any, count: int, generator: np.random.Generator) -> Any:
    """Mixtures of two near features, moved by half the difference of another such pair."""
    one, other = generator.integers(len(real), size=(2, count))
    second, fourth = generator.integers(near.shape[1], size=(2, count))
    weight = 0.5 * generator.random((count, 1), np.float32)
    mixed = (1 - weight) * real[one] + weight * real[near[one, second]]
    return mixed + 0.5 * (real[other] - real[near[other, fourth]])


def search(made: tuple[Tensor, int | None]) -> tuple[Any, int]:
    """The lists, and the length of the rows that were multiplied."""
    rows, dims = made
    widths = []
    planned = exact.plan_search

    def watched(*arguments: Any) -> Plan:
        plan = planned(*arguments)
        widths.append(plan.dims + 1 if plan.dims else rows.shape[1])
        return plan

    exact.plan_search = watched
    try:
        lists = nearest_neighbors(rows, K, dims=dims)
    finally:
        exact.plan_search = planned
    return lists, widths[-1] if widths else rows.shape[1]


def seconds_of_products(count: int, width: int) -> float:
    """Seconds that one product of each pair of rows takes at the speed of this machine."""
    kind = torch.bfloat16 if fast_bfloat16() else torch.float32
    fastest = float("inf")
    for height, columns in ((2048, 512), (2048, 2048), (1024, 1024)):
        one, other = (torch.randn(size, width).to(kind) for size in (height, columns))
        products = torch.empty(height, columns, dtype=kind)
        for _ in range(30):
            start = time.perf_counter()
            torch.mm(one, other.T, out=products)
            fastest = min(fastest, (time.perf_counter() - start) / products.numel())
    return fastest * count * count / 2


def main() -> None:
    """Parses the arguments, searches with each number of dimensions, prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument(
        "--kind", default="directions",
        help="directions (most of it in 64 of them), isotropic, or an .npz of tools/extract.py, of "
        "which mixtures are made if it has too few",
    )  # fmt: skip
    parser.add_argument(
        "--dims", nargs="+", default=["0", "auto"], help="dimensions to project to; 0: all of them"
    )
    arguments = parser.parse_args()
    size = arguments.images, width_of(arguments.kind, arguments.dim)
    lists, table = None, []
    for dims in arguments.dims:
        number = None if dims == "auto" else int(dims)
        measured = measure(
            search, make_rows, arguments.kind, *size, number,
            warm_up=("isotropic", 5000, size[1], 0 if number == 0 else min(32, size[1] - 1)),
        )  # fmt: skip
        found, width = measured.result
        floor = seconds_of_products(size[0], width)
        lists = found if lists is None else lists
        line = {
            "stage": "neighbors", "kind": "file" if "." in arguments.kind else arguments.kind,
            "size": f"{size[0]:,} x {size[1]}", "dims": dims, "width": width,
            "seconds": round(measured.seconds, 2), "floor_seconds": round(floor, 2),
            "over_floor": round(measured.seconds / floor, 2),
            "extra_mb": round(measured.extra_mb, 1), "agrees": bool((found == lists).all()),
        }  # fmt: skip
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        table.append([dims, *(line[name] for name in (
            "width", "seconds", "floor_seconds", "over_floor", "extra_mb", "agrees"))])  # fmt: skip
    headers = ("dims", "length multiplied", "seconds", "products alone, s", "over floor",
               "MB above the features", "same lists")  # fmt: skip
    machine = platform.processor() or platform.machine()
    sys.stdout.write(
        f"{size[0]:,} x {size[1]}, k {K}, {machine}, {torch.get_num_threads()} threads, "
        f"bfloat16: {fast_bfloat16()}\n{tabulate(table, headers, disable_numparse=True)}\n"
    )


if __name__ == "__main__":
    main()
