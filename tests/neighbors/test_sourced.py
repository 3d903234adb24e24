"""The clustering distance of SSG and MMT, with and without a source term."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.labelling.epsilon import eps_of_share
from reid.neighbors import SparseDistances, dbscan, reranked_jaccard, source_push, sourced


def unit(count: int, seed: int = 0, dim: int = 8) -> Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1)


def dense(distances: SparseDistances) -> np.ndarray:
    found = distances.far + distances.push[:, None] + distances.push
    entries = distances.graph.tocoo()
    found[entries.row, entries.col] = entries.data
    return found


def published_jaccard(feature: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """J entry by entry, from the words of the specification."""
    count = len(feature)
    d = ((feature[:, None] - feature) ** 2).sum(2)
    d = d / d.max(1, keepdims=True)
    order = np.argsort(d, axis=1, kind="stable")

    def reciprocal(i: int, k: int) -> set[int]:
        return {int(j) for j in order[i, : k + 1] if i in order[j, : k + 1]}

    weights = np.zeros((count, count))
    for i in range(count):
        members = reciprocal(i, k1)
        for j in sorted(members):
            half = reciprocal(j, round(k1 / 2))
            if len(half & reciprocal(i, k1)) > 2 / 3 * len(half):
                members |= half
        own = sorted(members)
        weights[i, own] = np.exp(-d[i, own]) / np.exp(-d[i, own]).sum()
    weights = np.stack([weights[order[i, :k2]].mean(0) for i in range(count)])
    m = np.minimum(weights[:, None], weights).sum(2)
    return np.maximum(0, 1 - m / (2 - m))


@pytest.mark.oracle
def test_distances_and_eps_are_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("sourcedist_*.npz"))
    assert files
    for path in files:
        a = dict(np.load(path))
        feature, source = (torch.from_numpy(a[f"{name}_feature"]) for name in ("target", "source"))
        lists = int(a["k1"]), int(a["k2"])
        plain = reranked_jaccard(feature, *lists)
        np.testing.assert_allclose(dense(plain), a["jaccard"], atol=1e-5)
        weight = float(a["lambda_source"])
        push = source_push(feature, source)
        distances = reranked_jaccard(feature, *lists, push=push, source_weight=weight)
        np.testing.assert_allclose(dense(distances), a["distance"], atol=1e-5)
        shares = [name.removeprefix("rho_") for name in a if name.startswith("rho_")]
        assert shares
        for share in shares:
            eps = eps_of_share(distances, float(a[f"rho_{share}"]))
            assert eps == pytest.approx(float(a[f"eps_{share}"]), abs=1e-5)
            found = dbscan(distances.graph, eps, 4, always_itself=False)
            np.testing.assert_array_equal(found, a[f"label_{share}"])


def test_the_jaccard_distance_by_its_words() -> None:
    feature = unit(40)
    found = reranked_jaccard(feature, 6, 3)
    expected = published_jaccard(feature.double().numpy(), 6, 3)
    np.testing.assert_allclose(dense(found), expected, atol=1e-5)
    assert found.graph.dtype == np.float32
    assert (found.graph != found.graph.T).nnz == 0


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_the_source_term_in_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sourced, "_ROWS", rows)
    monkeypatch.setattr(sourced, "_SOURCE_ROWS", max(1, rows // 2))
    feature, source = unit(30), unit(20, 1)
    squared = (feature[:, None].double() - source.double()).square().sum(2).numpy()
    expected = (1 - np.exp(-squared)).min(1)
    expected /= expected.max()
    push = source_push(feature, source)
    np.testing.assert_allclose(push, expected, atol=1e-6)
    plain = dense(reranked_jaccard(feature, 6, 2))
    with_source = dense(reranked_jaccard(feature, 6, 2, push=push, source_weight=0.3))
    expected = 0.7 * plain + 0.3 * (push[:, None] + push)
    np.testing.assert_allclose(with_source, expected, atol=1e-6)
    assert np.diag(with_source) == pytest.approx(0.6 * push, abs=1e-6)
    cut = reranked_jaccard(feature, 6, 2, push=push, source_weight=0.3, max_distance=0.5)
    kept = with_source <= 0.5
    assert (dense(cut)[kept] == with_source[kept].astype(np.float32)).all()


def test_images_that_lie_on_the_source() -> None:
    feature = unit(10)
    assert not source_push(feature, feature).any()
    assert not source_push(feature[:1], feature).any()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.zeros(0, 8), "with M > 0"),
        (torch.ones(3, 7), r"features \(M, 8\)"),
        (torch.full((3, 8), torch.nan), "finite"),
    ],
)
def test_a_source_that_does_not_fit(source: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"source: expected .*{message}"):
        source_push(unit(5), source)


def test_arguments_out_of_range() -> None:
    for options in ({"k1": 0}, {"k2": 0}, {"source_weight": 1.0}):
        with pytest.raises(ValueError, match="expected k1 and k2"):
            reranked_jaccard(unit(5), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"push: expected the shape \(5,\)"):
        reranked_jaccard(unit(5), push=np.zeros(4), source_weight=0.1)


def test_few_images_and_equal_images() -> None:
    for count in (1, 2, 3):
        assert dense(reranked_jaccard(unit(count), 20, 6)).shape == (count, count)
    same = dense(reranked_jaccard(unit(1).repeat(6, 1), 20, 6))
    assert np.abs(same).max() < 1e-6


@pytest.mark.parametrize("push", [None, np.linspace(0, 1, 40)])
@pytest.mark.parametrize("rho", [0.01, 0.1, 0.7, 1.0])
def test_eps_is_the_mean_of_the_smallest(rho: float, push: np.ndarray | None) -> None:
    feature = unit(40)
    feature[1] = feature[0]  # without a source, a distance of 0, which is left out
    distances = reranked_jaccard(feature, 4, 2, push=push, source_weight=0.1)
    assert distances.graph.nnz < 1600, "some pairs must not be stored"
    upper = np.sort(dense(distances)[np.triu_indices(40, 1)])
    upper = upper[upper > 1e-6]
    number = int(np.round(rho * len(upper)))
    assert eps_of_share(distances, rho) == pytest.approx(upper[:number].mean(), abs=1e-7)
    if push is None:
        assert len(upper) < 780


def test_a_share_that_is_no_pair() -> None:
    distances = reranked_jaccard(unit(5), 2, 1)
    with pytest.raises(ValueError, match=r"rho: 0\.01 of 10 pairs is no pair; .* at least 0\.1"):
        eps_of_share(distances, 0.01)
    with pytest.raises(ValueError, match="rho: expected above 0"):
        eps_of_share(distances, 0)


def test_an_image_need_not_be_its_own_neighbour() -> None:
    feature = torch.cat((unit(1).repeat(3, 1), unit(1, 1).repeat(3, 1)))
    push = np.array([1.0, 1, 1, 0, 0, 0])
    graph = reranked_jaccard(feature, 2, 1, push=push, source_weight=0.2).graph
    # images 0 to 2 are 0.4 from themselves and from each other
    assert dbscan(graph, 0.3, 3, always_itself=False).tolist() == [-1, -1, -1, 0, 0, 0]
    assert dbscan(graph, 0.3, 1, always_itself=False).tolist() == [-1, -1, -1, 0, 0, 0]
    assert dbscan(graph, 0.3, 1).tolist() == [0, 1, 2, 3, 3, 3]
    assert dbscan(graph, 0.5, 3, always_itself=False).tolist() == [0, 0, 0, 1, 1, 1]
