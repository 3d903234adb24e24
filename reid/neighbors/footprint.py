"""Estimates of the memory that large jobs take."""

from __future__ import annotations

import logging

from reid.neighbors.exact import HALF_MARGIN

logger = logging.getLogger(__name__)
_LARGE = 50_000


def log_memory(job: str, count: int, megabytes: float) -> None:
    """Logs about how much memory a job takes beside its features, from 50,000 images on."""
    if count >= _LARGE:
        logger.info("%s %s images, about %s MB above their features", job, f"{count:,}",
                    f"{megabytes:,.0f}")  # fmt: skip


def neighbors_memory_mb(count: int, dim: int, k: int) -> float:
    """About how many MB `nearest_neighbors` takes: a half-precision copy, and the candidates.

    A search with projected rows takes no more: what the shorter copy saves is room for candidates.
    """
    return count * (2 * dim + 8 * (k + HALF_MARGIN) + 12) / 2**20


def jaccard_memory_mb(count: int, dim: int, k1: int = 20, k2: int = 6) -> float:
    """About how many MB `jaccard_distance` takes, without what it returns.

    The search for neighbours, and the rows of weights.
    """
    return neighbors_memory_mb(count, dim, max(k1, k2)) + count * 12 * k1 * k2 / 2**20
