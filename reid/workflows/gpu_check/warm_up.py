"""Compiles the CPU's loops of search, clustering, ranking and loading, for later sections."""

from __future__ import annotations

from reid.neighbors import dbscan, jaccard_rows
from reid.workflows.gpu_check.fast.ranking import make_ranked, mean_precision
from reid.workflows.gpu_check.features import trained_like


def main() -> None:
    """Calls each once with small input; numba caches the compiled code beside the sources."""
    features = trained_like(400, 32, ties=True)
    dbscan(jaccard_rows(features), 0.5, 4)
    mean_precision(make_ranked((40, 200, 10, 3), 32))


if __name__ == "__main__":
    main()
