"""The automatic choice of eps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.metrics import adjusted_rand_score, silhouette_samples
from torch.nn import functional as F

from reid.config import load_config
from reid.labelling import ClusteringError, JaccardDBSCAN
from reid.labelling.epsilon import CANDIDATES, choose_eps, mean_silhouette
from reid.neighbors import dbscan, jaccard_distance
from reid.projects.cap import CameraProxyClusterer
from reid.registry import CLUSTERER, ConfigError, build
from reid.structures import FeatureSet


def persons(
    count: int, images: int, spread: float, seed: int = 0
) -> tuple[torch.Tensor, FeatureSet]:
    """Identities, and features around a centre for each."""
    generator = torch.Generator().manual_seed(seed)
    pids = torch.arange(count * images) % count
    centres = F.normalize(torch.randn(count, 64, generator=generator), dim=1)
    noise = torch.randn(len(pids), 64, generator=generator) / 8
    features = F.normalize(centres[pids] + spread * noise, dim=1)
    return pids, FeatureSet.of(features, pids, pids % 3)


@pytest.fixture(scope="module")
def graph() -> scipy.sparse.csr_matrix:
    return jaccard_distance(persons(20, 12, 1.2)[1].test, 20, 6)


@pytest.mark.parametrize("eps", [0.2, 0.3, 0.6, 0.75])
def test_the_silhouette_is_scikit_learns(graph: scipy.sparse.csr_matrix, eps: float) -> None:
    clusters = dbscan(graph, eps, 4)
    dense = np.ones(graph.shape)
    entries = graph.tocoo()
    dense[entries.row, entries.col] = entries.data
    np.fill_diagonal(dense, 0)
    (inside,) = np.nonzero(clusters >= 0)
    assert len(inside) > 0
    expected = silhouette_samples(
        dense[np.ix_(inside, inside)], clusters[inside], metric="precomputed"
    )
    assert mean_silhouette(graph, clusters) == pytest.approx(expected.sum() / len(clusters))
    without = graph.copy()
    without.setdiag(1)  # an image's distance to itself is ignored
    assert mean_silhouette(without, clusters) == pytest.approx(expected.sum() / len(clusters))


def test_silhouettes_by_hand() -> None:
    # 0 and 1 lie at 0.2, 2 and 3 at 0.4, 1 and 2 at 0.6; all else at 1
    pairs = {(0, 1): 0.2, (2, 3): 0.4, (1, 2): 0.6}
    rows, columns = zip(*pairs, strict=True)
    half = scipy.sparse.csr_matrix(([*pairs.values()], (rows, columns)), (5, 5))
    graph = half + half.T
    found = mean_silhouette(graph, np.array([0, 0, 1, 1, -1]))
    assert found == pytest.approx((0.8 + (1 - 0.2 / 0.8) + (1 - 0.4 / 0.8) + 0.6) / 5)
    # an image alone in its cluster counts 0, but is a cluster for the others
    found = mean_silhouette(graph, np.array([0, 0, 1, 2, 2]))
    assert found == pytest.approx((0.8 + (1 - 0.2 / 0.6) + 0 + (0.4 - 1) / 1 + 0) / 5)
    for clusters in ([0, 0, 0, 0, -1], [-1] * 5):
        assert mean_silhouette(graph, np.array(clusters)) == 0


@pytest.mark.parametrize(("count", "images"), [(15, 30), (60, 8), (120, 5)])
@pytest.mark.parametrize("spread", [0.8, 1.2])
def test_close_to_the_best_eps_for_persons_of_few_or_many_images(
    count: int, images: int, spread: float
) -> None:
    pids, features = persons(count, images, spread)
    graph = jaccard_distance(features.test, 20, 6)

    def rand(clusters: np.ndarray) -> float:
        alone = clusters.max() + 1 + np.arange(len(clusters))
        return float(adjusted_rand_score(pids, np.where(clusters < 0, alone, clusters)))

    best = max(rand(dbscan(graph, eps, 4)) for eps in CANDIDATES)
    chosen = choose_eps(graph, 4)
    assert chosen.silhouettes.keys() == set(CANDIDATES)
    assert np.array_equal(chosen.clusters, dbscan(graph, chosen.eps, 4))
    assert best > 0.5
    assert rand(chosen.clusters) > best - 0.05


def test_bad_clusters_are_better_than_none() -> None:
    pairs = np.array([[0, 1], [2, 3], [0, 2], [1, 3]])  # the clusters lie across the pairs
    near = scipy.sparse.csr_matrix(([0.3, 0.3, 0.301, 0.301], pairs.T), (4, 4))
    found = choose_eps(near + near.T, 2, [0.2, 0.3])
    assert found.silhouettes[0.2] == 0
    assert found.eps == 0.3
    nothing = choose_eps(scipy.sparse.csr_matrix((3, 3), dtype=np.float32), 2)
    assert (nothing.eps, nothing.clusters.tolist()) == (CANDIDATES[0], [-1, -1, -1])
    with pytest.raises(ValueError, match="candidates: expected one or more"):
        choose_eps(near, 2, [])


def test_eps_auto_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    features = persons(20, 12, 1.0)[1]
    spec = {"name": "CameraProxyClusterer", "eps": "auto"}
    clusterer: CameraProxyClusterer = build(CLUSTERER, spec, "clusterer")
    assert clusterer.choices == {}
    labels = clusterer(features)
    eps = clusterer.choices["eps"]
    assert eps in CANDIDATES
    assert f"eps {eps:g} was chosen by the mean silhouette: 0.1 " in caplog.text
    given = CameraProxyClusterer(eps=eps)
    assert torch.equal(given(features).proxy, labels.proxy)
    assert given.choices == {}
    assert labels.num_clusters == 20
    graph = jaccard_distance(features.test, 20, 6)
    assert torch.equal(clusterer.graph_clusters(graph), labels.cluster)

    tighter = persons(20, 12, 0.5)[1]
    assert torch.equal(clusterer(tighter).cluster, given(tighter).cluster)  # eps stays
    assert clusterer.choices == {"eps": eps}
    resumed: CameraProxyClusterer = build(CLUSTERER, spec, "clusterer")
    assert resumed.state_dict() == {}
    resumed.load_state_dict(clusterer.state_dict())
    assert torch.equal(resumed(tighter).cluster, given(tighter).cluster)
    with pytest.raises(ValueError, match="eps: expected 0 < eps < 1, got 'x'"):
        resumed.load_state_dict({"eps": "x"})

    far = FeatureSet.of(torch.eye(30), torch.arange(30), torch.zeros(30).long())
    with pytest.raises(ClusteringError, match=r"raise clusterer\.eps \(auto chose 0\.1\) or"):
        JaccardDBSCAN(k1=1, k2=1, eps="auto")(far)
    with pytest.raises(ConfigError, match=r"clusterer\.eps: expected .*float.*auto.*, got 'aut"):
        build(CLUSTERER, {"name": "JaccardDBSCAN", "eps": "automatic"}, "clusterer")
    with pytest.raises(ValueError, match="eps: expected 0 < eps < 1, or auto, got 1"):
        JaccardDBSCAN(eps=1)


def test_a_run_writes_what_was_chosen(tmp_path: Path, train_tiny: Callable[..., Path]) -> None:
    settings = tmp_path / "auto.yaml"
    settings.write_text(
        "DATALOADER: {SAMPLER: {NAME: ProxyBalancedSampler, STEPS_PER_EPOCH: 2}}\n"
        "MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}\n"
        "CLUSTERER: {NAME: CameraProxyClusterer}\nCRITERION: [O2CAPLoss]\n"
    )
    assert load_config(settings).clusterer is not None
    folder = train_tiny(settings, "run", "CLUSTERER.EPS", "auto")
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    chosen = [line["eps"] for line in lines if line["kind"] == "labels"]
    assert len(chosen) == 2
    assert chosen[0] == chosen[1]
    assert chosen[0] in CANDIDATES
    log = (folder / "log.txt").read_text()
    assert log.count("was chosen by the mean silhouette") == 1
