"""The most similar vectors of a gallery, with or without an index."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from reid.neighbors.indexes import BLOCK_ROWS, Index, Rows, load_faiss
from reid.neighbors.kernels import Floats
from reid.structures import ProgressBar

_BLOCK_QUERIES = 1024
_SCORED_BYTES = 64 * 2**20


class Similar(NamedTuple):
    """The most similar rows of a gallery, best first.

    Attributes:
        scores: (Q, k) inner products; -inf where there is no such row.
        rows: (Q, k) places in the gallery; -1 where there is none.
    """

    scores: Floats
    rows: Rows


def most_similar(
    index: Index | None,
    queries: Floats,
    gallery: Floats,
    k: int,
    *,
    allowed: npt.NDArray[np.bool_] | None = None,
    progress: ProgressBar | None = None,
) -> Similar:
    """The most similar rows of a gallery for each query; scores are never approximate.

    Args:
        index: Of the gallery; None: every row is looked at.
        queries: (Q, D).
        gallery: (N, D).
        k: Rows for each query.
        allowed: (N,) rows that may be answers. Such a choice is always searched exactly, since an
            index finds few of the rows that remain.
        progress: Called with (queries' worth of work done, Q).
    """
    parts = []
    for start in range(0, len(queries), _BLOCK_QUERIES):
        block = np.ascontiguousarray(queries[start : start + _BLOCK_QUERIES], np.float32)
        if index is None or allowed is not None:
            parts.append(_all_compared(block, gallery, k, allowed))
        else:
            parts.append(_scored(block, gallery, index.candidates(block, k), k))
        if progress is not None:
            progress(start + len(block), len(queries))
    if not parts:
        return Similar(np.empty((0, k), np.float32), np.empty((0, k), np.int64))
    return Similar(
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.rows for part in parts]),
    )


def _all_compared(
    queries: Floats, gallery: Floats, k: int, allowed: npt.NDArray[np.bool_] | None
) -> Similar:
    faiss = load_faiss()
    best = Similar(
        np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    )
    for start in range(0, len(gallery), BLOCK_ROWS):
        block = gallery[start : start + BLOCK_ROWS]
        rows = np.arange(start, start + len(block))
        if allowed is not None:
            rows = rows[allowed[rows]]
            block = gallery[rows]
        if len(rows):
            count = min(k, len(rows))
            scores, places = faiss.knn(queries, block, count, metric=faiss.METRIC_INNER_PRODUCT)
            both = np.concatenate((best.scores, scores), 1)
            which = np.concatenate((best.rows, rows[places]), 1)
            best = _first(both, which, k)
    return best


def _scored(queries: Floats, gallery: Floats, candidates: Rows, k: int) -> Similar:
    """The best of the candidates by their own features."""
    count, dim = candidates.shape[1], gallery.shape[1]
    scores = np.full((len(queries), count), -np.inf, np.float32)
    height = max(1, _SCORED_BYTES // (4 * count * dim))
    for start in range(0, len(queries), height):
        rows = candidates[start : start + height]
        products = np.einsum("qd,qcd->qc", queries[start : start + height], gallery[rows])
        scores[start : start + height] = np.where(rows >= 0, products, -np.inf)
    short = k - count
    if short > 0:
        scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
        candidates = np.pad(candidates, ((0, 0), (0, short)), constant_values=-1)
    return _first(scores, candidates, k)


def _first(scores: Floats, rows: Rows, k: int) -> Similar:
    """The k best of each line; of equal ones those that stand in front."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Similar(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))
