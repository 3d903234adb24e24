from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.cluster import DBSCAN
from torch.nn import functional as F

from reid.neighbors import (
    TIE_TOLERANCE,
    approximate_neighbors,
    dbscan,
    exact,
    farthest_distances,
    half_length,
    jaccard,
    jaccard_distance,
    kernels,
    nearest_neighbors,
)
from reid.neighbors import search as search_module
from reid.neighbors.jaccard import by_columns
from reid.neighbors.jaccard_torch import jaccard_on_device


def clustered_features(count: int, groups: int, dim: int = 24, noise: float = 0.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    centres = torch.randn(groups, dim, generator=generator)
    group = torch.randint(groups, (count,), generator=generator)
    return F.normalize(centres[group] + noise * torch.randn(count, dim, generator=generator), dim=1)


def dense(distances: scipy.sparse.csr_matrix) -> np.ndarray:
    full = np.ones(distances.shape, np.float32)
    full[np.repeat(np.arange(len(full)), np.diff(distances.indptr)), distances.indices] = (
        distances.data
    )
    return full


def plain_neighbors(features: torch.Tensor, k: int) -> np.ndarray:
    """Dense, in double precision, equal distances by index."""
    x = features.double().numpy()
    distance = (x**2).sum(1)[:, None] + (x**2).sum(1) - 2 * x @ x.T
    np.fill_diagonal(distance, -1)
    return np.argsort(distance, axis=1, kind="stable")[:, :k]


def plain_jaccard(features: torch.Tensor, k1: int, k2: int) -> np.ndarray:
    """The definition with sets and dense rows."""
    x = features.double().numpy()
    count = len(x)
    order = plain_neighbors(features, max(k1, k2))
    squared = 2 - 2 * x @ x.T

    def reciprocal(i: int, n: int) -> set[int]:
        return {j for j in order[i, :n] if i in order[j, :n]}

    half = min(round(k1 / 2) + 1, count)
    weights = np.zeros((count, count))
    for i in range(count):
        own = reciprocal(i, k1)
        union = set(own)
        for c in own:
            theirs = reciprocal(c, half)
            if len(theirs & own) > 2 / 3 * len(theirs):
                union |= theirs
        members = sorted(union)
        values = np.exp(-squared[i, members])
        weights[i, members] = values / values.sum()
    weights = np.stack([weights[order[i, :k2]].mean(0) for i in range(count)])
    result = np.empty((count, count))
    for i in range(count):
        shared = np.minimum(weights[i], weights).sum(1)
        result[i] = 1 - shared / (2 - shared)
    return result


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("block_size", [50, 5000])
@pytest.mark.parametrize("count", [1, 50, 333])
def test_neighbors_are_exact(count: int, block_size: int, half: bool) -> None:
    features = clustered_features(count, 9)
    for k in {1, min(count, 21), count}:
        found = nearest_neighbors(features, k, block_size=block_size, half_precision=half)
        assert np.array_equal(found, plain_neighbors(features, k))
    squared = torch.cdist(features.double(), features.double()).square().amax(1)
    farthest = farthest_distances(features, block_size=block_size)
    np.testing.assert_allclose(farthest, squared, atol=1e-5)


@pytest.mark.parametrize("half", [True, False])
def test_neighbors_of_vectors_of_any_length(half: bool) -> None:
    features = clustered_features(200, 5) * torch.rand(200, 1) * 10
    found = nearest_neighbors(features, 10, block_size=33, half_precision=half)
    assert np.array_equal(found, plain_neighbors(features, 10))


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("size", [1e-44, 1e-20, 1e19, 3e37])
@pytest.mark.parametrize("ordinary", [0, 100])
def test_neighbors_of_tiny_and_huge_vectors(size: float, ordinary: int, half: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 8, generator=generator)
    features[ordinary:] *= size
    x = features.double().numpy()
    score = x @ x.T - (x**2).sum(1) / 2
    np.fill_diagonal(score, np.inf)
    found = nearest_neighbors(features, 10, block_size=33, half_precision=half)
    assert np.array_equal(found, np.argsort(-score, axis=1, kind="stable")[:, :10])


@pytest.mark.parametrize("half", [True, False])
def test_equal_vectors_are_ordered_by_index(half: bool) -> None:
    features = clustered_features(40, 4)[torch.arange(400) % 3]
    for block_size in (32, 1000):
        index = nearest_neighbors(features, 30, block_size=block_size, half_precision=half)
        for i in (0, 200, 399):
            same = [j for j in range(400) if j % 3 == i % 3 and j != i]
            assert index[i].tolist() == [i, *same[:29]]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("spread", [3e-5, 3e-3, 0.1])
def test_rows_in_doubt_are_searched_again(spread: float, half: bool) -> None:
    # 90 vectors closer to each other than half or single precision can tell apart
    generator = torch.Generator().manual_seed(0)
    centre = F.normalize(torch.randn(1, 48, generator=generator), dim=1)
    features = torch.cat((centre + spread * torch.randn(90, 48, generator=generator),
                          clustered_features(300, 5, 48)))  # fmt: skip
    found = nearest_neighbors(features, 5, half_precision=half)
    assert np.array_equal(found, plain_neighbors(features, 5))


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (5, 1), (12, 4), (400, 400), (1, 3)])
def test_jaccard_is_the_definition(k1: int, k2: int) -> None:
    features = clustered_features(120, 8)
    found = jaccard_distance(features, k1, k2, block_size=50)
    np.testing.assert_allclose(dense(found), plain_jaccard(features, k1, k2), atol=2e-6)
    assert (found != found.T).nnz == 0
    assert found.has_sorted_indices
    assert (found.diagonal() < 1e-6).all()
    assert all(i in found.indices[found.indptr[i] : found.indptr[i + 1]] for i in range(120))


def test_distances_of_zero_are_stored() -> None:
    features = F.normalize(torch.eye(4).repeat_interleave(6, 0) + 1e-8, dim=1)
    found = jaccard_distance(features, k1=6, k2=2)
    assert found.nnz == 4 * 36
    assert (found.data == 0).all()


def test_max_distance_only_leaves_out() -> None:
    features = clustered_features(300, 10)
    everything = jaccard_distance(features)
    near = jaccard_distance(features, max_distance=0.5)
    everything.data[everything.data > 0.5] = 1
    assert np.array_equal(dense(near), dense(everything))
    assert near.nnz < everything.nnz


def test_same_bits_for_any_block_size_and_threads() -> None:
    features = clustered_features(700, 30)
    first = jaccard_distance(features, block_size=4096)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        other = jaccard_distance(features, block_size=100)
    finally:
        numba.set_num_threads(threads)
    for name in ("indptr", "indices", "data"):
        assert np.array_equal(getattr(first, name), getattr(other, name))


def test_compiled_code_is_called_for_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python answers Ctrl-C between two of these calls
    close = 3e-5 * torch.randn(90, 24, generator=torch.Generator().manual_seed(0))
    features = torch.cat((clustered_features(210, 9), clustered_features(1, 1) + close))
    expected = jaccard_distance(features)
    labels = dbscan(expected, 0.5, 4)
    most: dict[str, int] = {}

    def watched(name: str, kernel: Callable[..., object]) -> Callable[..., object]:
        def call(start: int, stop: int, *arguments: object) -> object:
            most[name] = max(stop - start, most.get(name, 0))
            return kernel(start, stop, *arguments)

        return call

    names = {
        kernels: ("_finite_rows", "_half_squared_norms", "_search_exactly"),
        importlib.import_module("reid.neighbors.rescoring"): ("_rescore",),
        jaccard: ("find_reciprocal", "count_members", "list_members", "soft_weights",
                  "count_columns", "average_rows", "count_in_columns", "take_by_column",
                  "count_pairs", "jaccard_part"),
        importlib.import_module("reid.neighbors.density"): (
            "_find_core", "_join_core", "_number_clusters", "_label_borders"),
    }  # fmt: skip
    for module, kernel_names in names.items():
        for name in kernel_names:
            monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    monkeypatch.setattr(kernels, "PIECE", 1)
    monkeypatch.setattr(jaccard, "PIECE", 1)
    found = jaccard_distance(features)
    for name in ("indptr", "indices", "data"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert np.array_equal(dbscan(found, 0.5, 4), labels)
    assert set(most) == {name for kernel_names in names.values() for name in kernel_names}
    assert max(most.values()) <= numba.get_num_threads()


def test_by_columns() -> None:
    matrix = scipy.sparse.random(40, 70, 0.2, "csr", np.float32, np.random.default_rng(0))
    for rows in (matrix, matrix[:0], matrix[7:8]):
        found, expected = by_columns(rows), rows.tocsc()
        assert found.format == "csc"
        for name in ("indptr", "indices", "data"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("eps", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("min_samples", [1, 2, 4, 9])
def test_dbscan_gives_the_labels_of_scikit_learn(eps: float, min_samples: int) -> None:
    distances = jaccard_distance(clustered_features(500, 40, noise=0.9), k1=15)
    expected = DBSCAN(eps=eps + TIE_TOLERANCE, min_samples=min_samples,
                      metric="precomputed").fit_predict(dense(distances).astype(float))  # fmt: skip
    found = dbscan(distances, eps, min_samples)
    assert np.array_equal(found, expected)


def test_ties_count_as_within_eps() -> None:
    above = np.nextafter(np.float32(0.5), np.float32(1))
    pairs = np.array([[0, 0.5, 1], [0.5, 0, above], [1, above, 0]], np.float32)
    graph = scipy.sparse.csr_matrix(pairs)
    assert dbscan(graph, 0.5, 2).tolist() == [0, 0, 0]
    assert dbscan(graph, 0.5, 2, tolerance=0).tolist() == [0, 0, -1]


def test_shared_rows_lie_at_exactly_one_half() -> None:
    # k2 = 6 averages: 4 of 6 shared rows give m = 2/3 and a distance of 1/2
    features = clustered_features(2000, 200, noise=0.8)
    data = jaccard_distance(features).data
    assert (np.abs(data - 0.5) < 1e-6).sum() > 10


def test_progress_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_FAISS_ROWS", 70)
    done: list[tuple[int, int]] = []
    features = clustered_features(300, 10)
    found = approximate_neighbors(
        features, 12, "hnsw", progress=lambda *counts: done.append(counts)
    )
    assert (found == plain_neighbors(features, 12)).mean() > 0.5
    assert [count for count, _ in done] == [35, 70, 105, 140, 150, 185, 220, 255, 290, 300]


@pytest.mark.parametrize(("k1", "half"), [(20, 11), (30, 16), (5, 3), (7, 5), (1, 1)])
def test_half_lists_round_half_to_even(k1: int, half: int) -> None:
    assert half_length(k1, 1000) == half


def test_errors() -> None:
    features = clustered_features(10, 2)
    with pytest.raises(ValueError, match="k: expected 1 to the number of vectors, 10, got 11"):
        nearest_neighbors(features, 11)
    with pytest.raises(ValueError, match="finite"):
        nearest_neighbors(torch.full((3, 2), torch.nan), 1)
    with pytest.raises(ValueError, match=r"expected \(N, D\)"):
        nearest_neighbors(torch.zeros(0, 4), 1)
    with pytest.raises(ValueError, match="k1: expected 1 or more, got 0"):
        jaccard_distance(features, k1=0)
    with pytest.raises(ValueError, match="expected eps above 0"):
        dbscan(jaccard_distance(features), 0, 4)


@pytest.mark.oracle
def test_jaccard_and_dbscan_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("cluster_*.npz"))
    assert files
    for path in files:
        arrays = np.load(path)
        checked = 0
        for name in arrays.files:
            if not name.startswith("jaccard_"):
                continue
            parts = name.split("_")
            k1, k2 = int(parts[2]), int(parts[4])
            found = jaccard_distance(torch.from_numpy(arrays["feature"]), k1, k2)
            np.testing.assert_allclose(dense(found), arrays[name], atol=3e-6, err_msg=str(path))
            prefix = f"cluster_label_k1_{k1}_k2_{k2}_eps_"
            for other in arrays.files:
                if other.startswith(prefix):
                    labels = dbscan(found, float(other.removeprefix(prefix)), 4)
                    assert np.array_equal(labels, arrays[other]), f"{path}: {other}"
                    checked += 1
        assert checked


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 300), (0, 100), (101, 300), (7, 8)])
def test_candidates_of_torch_give_the_exact_lists(
    monkeypatch: pytest.MonkeyPatch, half: bool, first: int, last: int
) -> None:
    # the GPU's code on the CPU, with blocks that do not divide the rows
    features = clustered_features(300, 10)
    calls = []

    def search(tensor: torch.Tensor, norms: np.ndarray, *rest: object) -> None:
        calls.append(tensor.dtype)
        exact._search_on_gpu(tensor, torch.from_numpy(norms), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(exact, "search_rows", search)
    monkeypatch.setattr(exact, "_GPU_COLUMNS", 70)
    task = exact.SearchTask(features.numpy(), 12, 64, half, "cpu")
    found = exact.neighbors_of(task, first, last, None)
    assert calls == [torch.bfloat16 if half else torch.float32]
    np.testing.assert_array_equal(found, plain_neighbors(features, 12)[first:last])


@pytest.mark.parametrize(
    ("count", "k1", "k2", "pairs"),
    [
        (400, 20, 6, 2**25),
        (400, 20, 6, 5000),
        (300, 7, 1, 1),
        (1500, 20, 6, 2**14),
        (9, 20, 6, 100),
    ],
)
def test_jaccard_distance_of_torch_is_that_of_the_cpu(
    count: int, k1: int, k2: int, pairs: int
) -> None:
    # the GPU's code on the CPU, in small blocks too
    features = clustered_features(count, max(2, count // 12), noise=0.4)
    features[count // 2] = features[0]
    for max_distance in (1.0, 0.5):
        expected = jaccard_distance(features, k1, k2, max_distance=max_distance)
        lists = torch.from_numpy(nearest_neighbors(features, min(max(k1, k2), count)))
        lengths = min(k1, count), half_length(k1, count), k2
        found = jaccard_on_device(features, lists, *lengths, max_distance, pairs=pairs).csr()
        assert found.has_canonical_format
        assert np.array_equal(found.indptr, expected.indptr)
        assert np.array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.data, expected.data, rtol=0, atol=2e-7)
        assert np.array_equal(dbscan(found, 0.5, 4), dbscan(expected, 0.5, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("half", [False, True])
def test_lists_and_labels_of_a_gpu_are_those_of_the_cpu(half: bool) -> None:
    features = clustered_features(3000, 100)
    on_gpu = nearest_neighbors(features.cuda(), 20, half_precision=half)
    assert np.array_equal(on_gpu, nearest_neighbors(features, 20))
    found, expected = jaccard_distance(features.cuda()), jaccard_distance(features)
    assert np.array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.data, expected.data, rtol=0, atol=2e-7)
    assert np.array_equal(dbscan(found, 0.5, 4), dbscan(expected, 0.5, 4))


def test_weights_that_underflow_share_nothing() -> None:
    # squared distances of over 100: far members of a set weigh exactly 0
    features = 3 * torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    found = jaccard_distance(features)
    assert found.has_canonical_format
    assert (found != found.T).nnz == 0
    assert (found.diagonal() < 1e-6).all()
    assert found.data.max() < 1
