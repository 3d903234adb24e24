#!/usr/bin/env python
"""What an approximate search costs in clusters: time, recall and labels, against the exact one.

Floor: the product of each pair of rows once, as for the exact search; an index that looks at fewer
can be below it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from functools import partial
from typing import Any

import torch
from floors import Parts, all_pairs
from measure import measure
from neighbors import make_rows
from sklearn.metrics import adjusted_rand_score
from tabulate import tabulate
from torch import Tensor

from reid.neighbors import (
    Labels,
    Search,
    approximate_neighbors,
    by_columns,
    dbscan,
    encode_neighbors,
    half_length,
    jaccard_of_rows,
    nearest_neighbors,
)
from reid.neighbors.inverted import share_found
from reid.neighbors.kernels import Indices

K2, EPS, MIN_SAMPLES = 6, 0.5, 4


def make(kind: str, count: int, dim: int, k1: int, search: Search) -> tuple[Tensor, int, Search]:
    """Unit vectors, and how their neighbours are searched."""
    return make_rows(kind, count, dim, None)[0], k1, search


def find_lists(made: tuple[Tensor, int, Search]) -> Indices:
    """The lists of the k1 nearest."""
    rows, k1, search = made
    if search == "exact":
        return nearest_neighbors(rows, k1)
    return approximate_neighbors(rows, k1, search)


def labels_of(rows: Tensor, lists: Indices) -> Labels:
    """The labels of `JaccardDBSCAN` with these lists."""
    k1 = lists.shape[1]
    weights = encode_neighbors(rows.numpy(), lists, k1, half_length(k1, len(rows)), K2)
    return dbscan(jaccard_of_rows(weights, by_columns(weights), EPS + 1e-5), EPS, MIN_SAMPLES)


def floor_of(kind: str, count: int, _: int, k1: int, search: Search, dim: int) -> Parts:
    """The products of all pairs; the arguments before `dim` are those of `make`."""
    return all_pairs(count, dim)


def main() -> None:
    """Parses the arguments, measures each search, prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=384, help="of drawn features")
    parser.add_argument("--k1", type=int, default=30)
    parser.add_argument(
        "--kind", default="directions",
        help="directions (most of it in 64 of them), isotropic, or an .npz of tools/extract.py, of "
        "which mixtures are made if it has too few",
    )  # fmt: skip
    parser.add_argument("--searches", nargs="+", choices=("ivf", "hnsw"), default=("ivf", "hnsw"))
    arguments = parser.parse_args()
    size = arguments.kind, arguments.images, arguments.dim, arguments.k1
    rows = make_rows(*size[:3], None)[0]
    true: dict[str, Any] = {}
    table = []
    for search in ("exact", *arguments.searches):
        small = "isotropic", 3000, rows.shape[1], arguments.k1, search
        measured = measure(
            find_lists, make, *size, search, warm_up=small,
            floor=partial(floor_of, dim=rows.shape[1]),
        )  # fmt: skip
        lists = measured.result
        labels = labels_of(rows, lists)
        true = true or {"lists": lists, "labels": labels}
        line = {
            "stage": "approximate", "kind": "file" if "." in arguments.kind else arguments.kind,
            "size": f"{arguments.images:,} x {rows.shape[1]}", "k1": arguments.k1,
            "search": search, "seconds": round(measured.seconds, 2),
            "recall": round(share_found(lists, true["lists"]), 5),
            "adjusted_rand_index": round(adjusted_rand_score(true["labels"], labels), 5),
            "clusters": int(labels.max()) + 1, "outliers": int((labels < 0).sum()),
            "extra_mb": round(measured.extra_mb, 1), **measured.floor.facts(),
        }  # fmt: skip
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        names = ("search", "seconds", "recall", "adjusted_rand_index", "clusters", "outliers",
                 "extra_mb")  # fmt: skip
        table.append([line[name] for name in names])
    headers = ("search", "seconds", "recall", "adjusted Rand index", "clusters", "outliers",
               "MB above the features")  # fmt: skip
    sys.stdout.write(
        f"{arguments.images:,} x {rows.shape[1]}, k1 {arguments.k1}, "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads\n"
        f"{tabulate(table, headers, disable_numparse=True)}\n"
    )


if __name__ == "__main__":
    main()
