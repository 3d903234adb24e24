"""k-reciprocal re-ranking of a given distance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reid.neighbors import rerank_distances, reranking, smallest_of_rows


def _dense(distance, k1, k2, lambda_value, subtract_minimum=True):
    """The published equations on whole matrices."""
    count = len(distance)
    shifted = distance - distance.min(0) if subtract_minimum else distance
    divisor = shifted.max(0)
    scaled = (shifted / np.where(divisor > 0, divisor, 1)).T
    ranks = np.argsort(scaled, axis=1, kind="stable")

    def reciprocal(i, length):
        return {j for j in ranks[i, :length] if i in ranks[j, :length]}

    weights = np.zeros((count, count))
    for i in range(count):
        near = reciprocal(i, k1 + 1)
        expanded = set(near)
        for j in near:
            half = reciprocal(j, round(k1 / 2) + 1)
            if len(half & near) > 2 / 3 * len(half):
                expanded |= half
        members = sorted(expanded)
        weights[i, members] = np.exp(-scaled[i, members])
        if members:
            weights[i] /= weights[i].sum()
    if k2 > 1:
        weights = np.stack([weights[ranks[i, :k2]].mean(0) for i in range(count)])
    shared = np.minimum(weights[:, None], weights[None]).sum(2)
    return (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * scaled


def _random_distance(count, dim=4, seed=0):
    """Neither symmetric nor least on the diagonal, as joint distances are."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, dim))
    distance = ((points[:, None] - points[None]) ** 2).sum(2)
    return distance + 0.3 * rng.random((count, count))


@pytest.mark.parametrize(
    ("count", "k1", "k2", "lambda_value"),
    [(60, 20, 6, 0.3), (60, 5, 1, 0.5), (12, 20, 6, 0.5), (40, 3, 9, 0.0), (30, 6, 2, 1.0)],
)
@pytest.mark.parametrize("subtract_minimum", [True, False])
def test_equals_the_equations_on_whole_matrices(
    count, k1, k2, lambda_value, subtract_minimum, monkeypatch
):
    distance = _random_distance(count)
    expected = _dense(distance, k1, k2, lambda_value, subtract_minimum)
    for rows in (count, 7):
        monkeypatch.setattr(reranking, "_BLOCK_BYTES", rows * 8 * count)
        result = rerank_distances(
            lambda images: distance[:, images].T, count, k1=k1, k2=k2,
            lambda_value=lambda_value, subtract_minimum=subtract_minimum,
        )  # fmt: skip
        assert np.abs(result.rows(0, count) - expected).max() < 1e-12
        blocks = dict(result.blocks())
        assert len(blocks) == -(-count // rows)
        assert np.array_equal(np.concatenate([*blocks.values()]), result.rows(0, count))
    some = np.array([5, 2, 9])
    assert np.array_equal(result.take(some), result.rows(0, count)[some])


def test_an_image_may_be_missing_from_its_own_list():
    """Then its set may be empty, and its weights before the averaging are 0."""
    distance = _random_distance(30)
    distance[np.arange(30), np.arange(30)] = distance.max(0)
    result = rerank_distances(lambda images: distance[:, images].T, 30, k1=2, k2=1)
    assert (np.diff(result.encoding.indptr) == 0).any()
    assert np.abs(result.rows(0, 30) - _dense(distance, 2, 1, 0.3)).max() < 1e-12


def test_one_image_and_equal_distances_divide_by_nothing():
    assert rerank_distances(lambda images: np.zeros((1, 1)), 1).rows(0, 1) == 0
    same = rerank_distances(lambda images: np.ones((len(images), 5)), 5, k1=2)
    assert np.isfinite(same.rows(0, 5)).all()


def test_equal_distances_come_by_index():
    lists = np.empty((2, 3), np.int32)
    smallest_of_rows(np.array([[1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 1.0]]), lists)
    assert lists.tolist() == [[1, 3, 0], [3, 0, 1]]


@pytest.mark.parametrize("wrong", [{"k1": 0}, {"k2": 0}, {"lambda_value": 1.5}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="expected count, k1 and k2 of 1 or more"):
        rerank_distances(lambda images: np.zeros((len(images), 4)), 4, **wrong)


def test_wrong_distances_are_named():
    with pytest.raises(ValueError, match="finite distances"):
        rerank_distances(lambda images: np.full((len(images), 4), np.nan), 4)
    with pytest.raises(ValueError, match=r"shape \(4, 4\), got \(4, 3\)"):
        rerank_distances(lambda images: np.zeros((len(images), 3)), 4)


def test_progress_reaches_the_end():
    seen = []
    rerank_distances(
        lambda images: _random_distance(9)[images], 9, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (9, 9)


@pytest.mark.oracle
def test_reranking_of_the_authors(oracle_dir: Path):
    files = [*sorted(oracle_dir.glob("iics_labels_*.npz"))]
    times = [*sorted(oracle_dir.glob("mgh_spatiotemporal*.npz"))]
    assert files
    assert times
    for path in files + times:
        a = np.load(path)
        key, weight = ("mixed_distance", 0.3) if path in files else ("joint_distance", 0.5)
        distance = a[key].astype(float)
        result = rerank_distances(
            lambda images, d=distance: d[:, images].T, len(distance), lambda_value=weight
        ).rows(0, len(distance))
        assert np.abs(result - a["reranked"]).max() < 1e-5, path
        assert np.abs(result - a["reranked_half"]).max() < 4e-3, path


@pytest.mark.oracle
def test_reranking_of_joint_scores_of_the_authors(oracle_dir: Path):
    files = sorted(oracle_dir.glob("streid_rerank*.npz"))
    assert files
    for path in files:
        a = np.load(path)
        distance, queries = 2 - 2 * a["joint_score"], int(a["num_query"])
        result = rerank_distances(
            lambda images, d=distance: d[:, images].T, len(distance), k1=int(a["k1"]),
            k2=int(a["k2"]), lambda_value=float(a["lambda_"]), subtract_minimum=False,
        )  # fmt: skip
        found = result.rows(0, queries)[:, queries:]
        assert np.abs(found - a["final_distance"]).max() < 1e-5, path
