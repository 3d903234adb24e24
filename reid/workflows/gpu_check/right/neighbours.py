"""Compares neighbours, Jaccard distances and clusters on the device with the CPU."""

from __future__ import annotations

import time

import numpy as np

from reid.neighbors import dbscan, jaccard_rows, nearest_neighbors
from reid.workflows.gpu_check.features import trained_like
from reid.workflows.gpu_check.findings import Context

_K, _EPS, _MIN_SAMPLES = 30, 0.5, 4
_ROUNDING = 2e-7  # of a distance from 0 to 1 in single precision


def run(context: Context) -> None:
    """Compares features with clusters, exact copies and many equal distances."""
    sizes, found = context.sizes, context.found
    features = trained_like(sizes.compared, sizes.dim, ties=True)
    k = min(_K, sizes.compared)
    begun = time.perf_counter()
    expected = nearest_neighbors(features, k)
    found.number("cpu_search_seconds", time.perf_counter() - begun)
    on_device = features.to(context.device)
    for name, half in (("as the device likes", None), ("in fp32", False), ("in bf16", True)):
        if not context.enough(1, f"the search {name}"):
            continue
        seen = nearest_neighbors(on_device, k, half_precision=half)
        other = int((seen != expected).any(1).sum())
        found.check(
            f"the {k} neighbours of {len(features):,} features, searched {name}, are the CPU's",
            not other,
            f"{other:,} lists differ",
        )
    if not context.enough(2, "Jaccard distances and clusters"):
        return
    graph, reference = jaccard_rows(on_device), jaccard_rows(features)
    same = np.array_equal(graph.indptr, reference.indptr) and np.array_equal(
        graph.indices, reference.indices
    )
    error = float(np.abs(graph.data - reference.data).max()) if same else float("inf")
    found.check(
        f"their Jaccard distances agree with the CPU to {_ROUNDING:g}",
        error <= _ROUNDING,
        f"largest difference {error:.1e}; {len(graph.data):,} and {len(reference.data):,} of them",
    )
    labels, others = (dbscan(one, _EPS, _MIN_SAMPLES) for one in (graph, reference))
    tied = int((np.abs(reference.data - _EPS) < 1e-6).sum())
    found.check(
        "their DBSCAN labels agree with the CPU",
        np.array_equal(labels, others),
        f"{int((labels != others).sum()):,} labels differ; {int(others.max()) + 1:,} clusters, "
        f"{tied:,} distances lie at eps itself",
    )
