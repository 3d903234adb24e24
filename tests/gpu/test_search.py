"""Search, clusters and ranking on a GPU. `REID_GPU_TESTS_ON=cpu` tries the tests out."""

from __future__ import annotations

import os

import pytest
import torch

from reid.workflows.gpu_check.features import trained_like

DEVICE = torch.device(os.environ.get("REID_GPU_TESTS_ON", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
    ),
]
np = pytest.importorskip("numpy")
pytest.importorskip("numba")
neighbors = pytest.importorskip("reid.neighbors")


@pytest.mark.parametrize("half", [None, False, True])
def test_neighbours_agree_with_the_cpu(half):
    features = trained_like(600, 48, ties=True)
    seen = neighbors.nearest_neighbors(features.to(DEVICE), 20, half_precision=half)
    assert np.array_equal(seen, neighbors.nearest_neighbors(features, 20))


def test_distances_and_clusters_agree_with_the_cpu():
    features = trained_like(600, 48, ties=True)
    seen = neighbors.jaccard_rows(features.to(DEVICE))
    expected = neighbors.jaccard_rows(features)
    assert np.array_equal(seen.indices, expected.indices)
    np.testing.assert_allclose(seen.data, expected.data, rtol=0, atol=2e-7)
    labels = neighbors.dbscan(expected, 0.5, 4)
    assert labels.max() > 0
    assert np.array_equal(neighbors.dbscan(seen, 0.5, 4), labels)


def test_a_ranking_agrees_with_the_cpu():
    ranking = pytest.importorskip("reid.workflows.gpu_check.fast.ranking")
    problem = ranking.make_ranked((30, 300, 12, 4), 48)
    on_device = {
        name: value.to(DEVICE) if name.endswith("feat") else value
        for name, value in problem.items()
    }
    seen, expected = ranking.mean_precision(on_device), ranking.mean_precision(problem)
    assert seen == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1
