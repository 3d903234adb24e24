"""Neighbours, Jaccard distances and DBSCAN against brute force in double precision."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from reid.neighbors import TIE_TOLERANCE, dbscan, jaccard_distance, nearest_neighbors

KINDS = ("random", "duplicated", "constant", "close", "coarse")


@st.composite
def features(draw: st.DrawFn) -> torch.Tensor:
    """Unit vectors: random, many equal, all equal, nearly equal, or on a coarse grid."""
    count, dim = draw(st.integers(1, 45)), draw(st.sampled_from((1, 2, 7, 16, 19)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(KINDS))
    rows = rng.normal(size=(count, dim))
    if kind == "duplicated":
        rows = rows[rng.integers(0, max(1, count // 3), count)]
    elif kind == "constant":
        rows[:] = rows[0]
    elif kind == "close":
        rows = rows[0] + 1e-4 * rows
    elif kind == "coarse":
        rows = np.round(rows) + 0.5
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.astype(np.float32))


def squared_distances(rows: torch.Tensor) -> np.ndarray:
    x = rows.double().numpy()
    return ((x[:, None] - x[None]) ** 2).sum(2)


@settings(max_examples=80, deadline=None)
@given(features(), st.integers(1, 60), st.booleans())
def test_lists_hold_the_nearest(rows: torch.Tensor, k: int, half: bool) -> None:
    k = min(k, len(rows))
    found = nearest_neighbors(rows, k, block_size=16, half_precision=half)
    distance = squared_distances(rows)
    np.testing.assert_array_equal(found[:, 0], np.arange(len(rows)))
    assert all(len(set(row)) == k for row in found.tolist())
    # float32 vectors are not exactly of unit length, so that ties differ in the last bits
    np.fill_diagonal(distance, -1)
    expected = np.sort(distance, axis=1)[:, :k]
    np.testing.assert_allclose(np.take_along_axis(distance, found, 1), expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(features(), st.integers(1, 60), st.integers(1, 12))
def test_jaccard_of_given_lists_is_the_definition(rows: torch.Tensor, k1: int, k2: int) -> None:
    count = len(rows)
    lists = nearest_neighbors(rows, min(max(k1, k2), count))
    squared = squared_distances(rows)
    length, half = min(k1, count), min(round(k1 / 2) + 1, count)

    def reciprocal(i: int, n: int) -> set[int]:
        return {j for j in lists[i, :n] if i in lists[j, :n]}

    weights = np.zeros((count, count))
    for i in range(count):
        own = reciprocal(i, length)
        merged = [r for r in (reciprocal(c, half) for c in own) if 3 * len(r & own) > 2 * len(r)]
        members = sorted(own.union(*merged))
        values = np.exp(-squared[i, members])
        weights[i, members] = values / values.sum()
    weights = np.stack([weights[lists[i, : min(k2, count)]].mean(0) for i in range(count)])
    shared = np.minimum(weights[:, None], weights[None]).sum(2)
    found = jaccard_distance(rows, k1, k2, block_size=16)
    full = np.ones((count, count))
    full[np.repeat(np.arange(count), np.diff(found.indptr)), found.indices] = found.data
    np.testing.assert_allclose(full, 1 - shared / (2 - shared), atol=3e-6)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0.05, 0.95), st.integers(1, 6))
def test_dbscan_is_that_of_scikit_learn(seed: int, count: int, eps: float, least: int) -> None:
    rng = np.random.default_rng(seed)
    distance = np.round(rng.random((count, count)), 2).astype(np.float32)
    distance = np.minimum(distance, distance.T)
    np.fill_diagonal(distance, 0)
    eps = round(eps, 2)
    expected = DBSCAN(eps=eps + TIE_TOLERANCE, min_samples=least, metric="precomputed")
    graph = scipy.sparse.csr_matrix(
        (distance.ravel(), np.tile(np.arange(count), count), np.arange(0, count**2 + 1, count)),
        shape=(count, count),
    )
    np.testing.assert_array_equal(dbscan(graph, eps, least), expected.fit_predict(distance))
