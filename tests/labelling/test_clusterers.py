from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import sklearn.cluster
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from reid.labelling import (
    HDBSCAN,
    Agglomerative,
    ClusteringError,
    FeatureClusterer,
    Infomap,
    JaccardDBSCAN,
    KMeans,
    Outliers,
    cluster_present,
    cluster_statistics,
)
from reid.labelling.hdbscan import _joined_graph
from reid.modeling.memories import ProxyMemory
from reid.neighbors import footprint, jaccard_distance
from reid.projects.cap import CameraProxyClusterer
from reid.registry import ConfigError
from reid.structures import FeatureSet, PseudoLabels


def feature_set(features: torch.Tensor, camids: torch.Tensor | None = None) -> FeatureSet:
    none = torch.zeros(len(features), dtype=torch.int64)
    return FeatureSet.of(features, camids=none if camids is None else camids)


def test_groups_are_found_and_not_split_by_camera() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(80) % 4
    centres = torch.randn(4, 16, generator=generator)
    features = F.normalize(centres[group] + 0.1 * torch.randn(80, 16, generator=generator), dim=1)
    labels = JaccardDBSCAN()(feature_set(features, torch.arange(80) // 40))
    assert labels.num_clusters == labels.num_proxies == 4
    assert cluster_statistics(labels, group)["ARI"] == 1


def test_no_cluster_says_what_to_change() -> None:
    features = F.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    with pytest.raises(
        ClusteringError,
        match=r"no cluster among 30 images: raise clusterer\.eps \(0\.05\) or lower clusterer\.min",
    ):
        JaccardDBSCAN(eps=0.05, min_samples=9)(feature_set(features))


def test_one_image_is_a_cluster_where_one_is_enough() -> None:
    labels = JaccardDBSCAN(min_samples=1)(feature_set(torch.ones(1, 1)))
    assert labels.cluster.tolist() == [0]


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": 1.0}, {"k1": 0}, {"min_samples": 0}])
def test_ranges(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        JaccardDBSCAN(**options)  # type: ignore[arg-type]


def test_clusters_of_several_cameras_count_without_a_split_by_camera() -> None:
    # 0 and 1 join cameras, 2 does not, and the outlier is in none.
    cluster = torch.tensor([0, 0, 0, 1, 1, 2, 2, -1])
    camids = torch.tensor([0, 0, 1, 2, 0, 1, 1, 0])
    features = FeatureSet.of(torch.randn(8, 4), camids=camids)
    unknown = torch.full((8,), -1)
    for labels in (
        PseudoLabels.from_clusters(cluster), PseudoLabels.from_clusters(cluster, camids),
    ):  # fmt: skip
        found = cluster_statistics(labels, unknown, features)
        assert found["cross-camera"] == pytest.approx(2 / 3)


def test_statistics() -> None:
    cluster = torch.tensor([0, 0, 0, 1, 1, -1, 1])
    camids = torch.tensor([0, 1, 1, 0, 0, 0, 2])
    labels = PseudoLabels.from_clusters(cluster, camids)
    unknown = torch.full((7,), -1)
    assert cluster_statistics(labels, unknown) == {
        "clusters": 2,
        "proxies": 4,
        "outliers": 1,
        "images/cluster": 3.0,
        "largest": 3,
        "cross-camera": 1.0,
    }
    pids = torch.tensor([5, 5, 6, 7, 7, 7, -1])
    numbers = cluster_statistics(labels, pids)
    assert numbers["purity"] == pytest.approx(4 / 5)
    assert 0 < numbers["ARI"] < 1
    nothing = PseudoLabels.from_clusters(torch.full((3,), -1))
    assert cluster_statistics(nothing, torch.zeros(3, dtype=torch.int64))["images/cluster"] == 0


def grouped(noise: float = 0.1) -> tuple[FeatureSet, torch.Tensor]:
    """80 images of 4 groups and 5 far from all."""
    generator = torch.Generator().manual_seed(0)
    group = torch.cat((torch.arange(80) % 4, torch.full((5,), -1)))
    centres = torch.randn(4, 16, generator=generator)
    features = centres[group] + noise * torch.randn(85, 16, generator=generator)
    features[80:] = torch.randn(5, 16, generator=generator)
    return feature_set(F.normalize(features, dim=1)), group


@pytest.mark.parametrize(
    "clusterer",
    [
        JaccardDBSCAN(k1=15),
        JaccardDBSCAN(k1=15, search="hnsw"),
        JaccardDBSCAN(k1=15, search="ivf"),
        HDBSCAN(min_cluster_size=8),
        Agglomerative(min_cluster_size=8),
        Infomap(min_cluster_size=8),
    ],
    ids=["dbscan", "dbscan, hnsw", "dbscan, ivf", "hdbscan", "agglomerative", "infomap"],
)
def test_every_clusterer_finds_the_groups(clusterer: FeatureClusterer) -> None:
    features, group = grouped()
    labels = clusterer(features)
    assert cluster_statistics(labels, group)["ARI"] == 1
    assert labels.num_clusters == 4
    assert bool((labels.cluster[:80] >= 0).all())


def test_k_means() -> None:
    features, group = grouped()
    labels = KMeans(num_clusters=4, iterations=50)(features[torch.arange(80)])
    assert cluster_statistics(labels, group[:80])["purity"] > 0.7
    assert labels.num_outliers == 0
    with pytest.raises(
        ClusteringError,
        match=r"85 images are too few for 86 clusters: lower clusterer\.num_clusters \(86\)",
    ):
        KMeans(num_clusters=86)(features)
    assert KMeans(num_clusters=85)(features).num_clusters == 85


def test_kmeans_without_normalised_centres_and_with_restarts() -> None:
    """Means of several networks' features are no unit vectors; k-means then compares distances."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[1.0, 0.0], [0.4, 0.0], [0.0, 0.7]])
    features = centres.repeat_interleave(20, 0)
    features = FeatureSet.of(features + 0.01 * torch.randn(60, 2, generator=generator))
    labels = KMeans(3, 50, seed=1, spherical=False, restarts=10)(features)
    expected = torch.arange(3).repeat_interleave(20)
    assert len({*zip(labels.cluster.tolist(), expected.tolist(), strict=True)}) == 3
    by_angle = KMeans(2, 50, restarts=10)(features).cluster
    assert by_angle.unique_consecutive().numel() == 2, "the first two centres have one direction"
    # fewer different images than means: no cluster is empty, no centre is NaN
    few = KMeans(4, spherical=False, restarts=10)(FeatureSet.of(centres.repeat(5, 1)))
    assert 2 <= few.num_clusters <= 3
    with pytest.raises(ValueError, match="restarts"):
        KMeans(2, restarts=0)


@pytest.mark.parametrize("clusterer", [
    HDBSCAN(), HDBSCAN(2, 1), Agglomerative(), JaccardDBSCAN(), JaccardDBSCAN(min_samples=1),
    JaccardDBSCAN(search="hnsw"), JaccardDBSCAN(search="ivf"), KMeans(1), KMeans(3), KMeans(1000),
    Infomap(), CameraProxyClusterer(),
], ids=lambda clusterer: type(clusterer).__name__)  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("alike", [True, False])
def test_few_images_are_clustered_or_an_error(
    clusterer: FeatureClusterer, count: int, alike: bool
) -> None:
    features = torch.ones(count, 4) / 2 if alike else torch.eye(4)[:count]
    told = ""
    try:
        labels = cluster_present(clusterer, feature_set(features))
    except ClusteringError as error:
        told = str(error)
    assert "clusterer." in told or "cannot cluster" in told if told else len(labels) == count


def test_an_error_says_that_features_are_not_finite() -> None:
    features, _ = grouped()
    for value in (torch.nan, torch.inf):
        features.test[[3, 7], 1] = value
        with pytest.raises(ClusteringError, match="features of 2 of 85 images are not finite: the"):
            cluster_present(KMeans(4), features)


def test_errors_of_a_plug_ins_clusterer_are_clustering_errors() -> None:
    class Means:
        def __call__(self, features: FeatureSet, progress: object = None) -> PseudoLabels:
            means = sklearn.cluster.KMeans(1000).fit(features.test.numpy())
            return PseudoLabels.from_clusters(torch.from_numpy(means.labels_).long())

    features, _ = grouped()
    with pytest.raises(ClusteringError, match=r"Means cannot cluster 85 images: n_samples=85 shou"):
        cluster_present(Means(), features)


def test_outliers() -> None:
    features, _ = grouped()
    found = {
        policy: JaccardDBSCAN(k1=15, outliers=policy)(features).cluster  # type: ignore[arg-type]
        for policy in ("drop", "nearest", "singleton")
    }
    lost = found["drop"] == -1
    assert 0 < int(lost.sum()) <= 5
    for other in ("nearest", "singleton"):
        assert torch.equal(found[other][~lost], found["drop"][~lost])
    nearest = features.test[lost] @ features.test[~lost].T
    assert set(found["nearest"][lost].tolist()) <= set(range(4))
    assert len(nearest) == int(lost.sum())
    assert len(set(found["singleton"][lost].tolist())) == int(lost.sum())
    assert int(found["singleton"].min()) == 0
    with pytest.raises(ValueError, match="outliers: expected drop, nearest or singleton"):
        JaccardDBSCAN(outliers="keep")  # type: ignore[arg-type]


@pytest.mark.parametrize("clusterer", [HDBSCAN(), Agglomerative(), JaccardDBSCAN()])
def test_too_few_images_are_no_cluster(clusterer: FeatureClusterer) -> None:
    with pytest.raises(ClusteringError, match=r"no cluster among 1 images: .*clusterer\.min"):
        clusterer(feature_set(torch.ones(1, 4) / 2))


@pytest.mark.parametrize(
    "clusterer", [HDBSCAN(), Agglomerative(), JaccardDBSCAN(), KMeans(2), Infomap()]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite(clusterer: FeatureClusterer, bad: float) -> None:
    features, _ = grouped()
    features.test[7, 3] = bad
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        clusterer(features)


@pytest.mark.parametrize(
    "clusterer", [HDBSCAN(), Agglomerative(), JaccardDBSCAN(), KMeans(8), Infomap()]
)
def test_large_jobs_log_their_memory(
    clusterer: FeatureClusterer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    features, _ = grouped()
    caplog.set_level("INFO")
    monkeypatch.setattr(footprint, "_LARGE", 86)
    clusterer(features)
    assert not caplog.messages
    monkeypatch.setattr(footprint, "_LARGE", 85)
    clusterer(features)
    (message,) = caplog.messages
    assert re.fullmatch(r"Clustering 85 images, about [0-9]+ MB above their features", message)


def test_statistics_of_other_images() -> None:
    features, group = grouped()
    labels = JaccardDBSCAN(k1=15)(features)
    with pytest.raises(ValueError, match="pids: expected those of 85 images, got 84"):
        cluster_statistics(labels, group[1:])
    with pytest.raises(ValueError, match="features: expected those of 85 images, got 5"):
        cluster_statistics(labels, group, features[torch.arange(5)])
    with pytest.raises(ValueError, match="last_clusters: expected those of 85 images, got 86"):
        cluster_statistics(labels, group, features, torch.zeros(86))


def test_images_that_could_not_be_read_are_outliers() -> None:
    grouped_features, _ = grouped()
    present = torch.ones(85, dtype=torch.bool)
    present[[0, 84]] = False
    features = FeatureSet.of(grouped_features.test, present=present)
    labels = cluster_present(KMeans(4), features)
    assert (labels.cluster == -1).nonzero()[:, 0].tolist() == [0, 84]
    features.test[:] = 0
    with pytest.raises(ClusteringError, match="the features of all 85 images are 0"):
        cluster_present(KMeans(4), features)


def test_bad_clusters_of_a_plug_in_give_a_warning_too(caplog: pytest.LogCaptureFixture) -> None:
    class Given:
        def __init__(self, cluster: list[int]) -> None:
            self._cluster = torch.tensor(cluster)

        def __call__(self, features: FeatureSet, progress: object = None) -> PseudoLabels:
            return PseudoLabels.from_clusters(self._cluster)

    features, _ = grouped()
    count = len(features)
    cluster_present(Given([0, *[-1] * (count - 1)]), features)
    assert "are outliers: other options of Given may help" in caplog.messages[0]
    cluster_present(Given([0] * (count - 1) + [1]), features)
    assert "images: other options of Given may help, or lower solver" in caplog.messages[1]
    with pytest.raises(ClusteringError, match=f"no cluster among {count} images: other options"):
        cluster_present(Given([-1] * count), features)


def test_health_of_features_and_of_the_last_epoch() -> None:
    features, group = grouped()
    labels = JaccardDBSCAN(k1=15)(features)
    numbers = cluster_statistics(labels, group, features, labels.cluster)
    assert numbers["agreement"] == 1
    assert numbers["silhouette"] > 0.5
    assert numbers["NMI"] == pytest.approx(1)
    shuffled = labels.cluster[torch.randperm(85, generator=torch.Generator().manual_seed(0))]
    assert cluster_statistics(labels, group, features, shuffled)["agreement"] < 0.2


@pytest.mark.parametrize("outliers", ["drop", "nearest", "singleton"])
def test_many_outliers_give_a_warning_under_every_policy(
    outliers: Outliers, caplog: pytest.LogCaptureFixture
) -> None:
    features, _ = grouped()
    JaccardDBSCAN(k1=15, outliers=outliers)(features)
    assert not caplog.messages
    generator = torch.Generator().manual_seed(0)
    feature = F.normalize(torch.randn(60, 32, generator=generator), dim=1)
    feature[:4] = feature[0]
    clusterer = JaccardDBSCAN(eps=0.1, outliers=outliers)
    clusterer(feature_set(feature))
    clusterer.graph_clusters(jaccard_distance(feature))
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert message.startswith("56 of 60 images are outliers: raise clusterer.eps (0.1) or low")


@pytest.mark.parametrize(
    ("clusterer", "advice"),
    [
        (JaccardDBSCAN(), r"lower clusterer\.eps \(0\.5\)"),
        (HDBSCAN(), r"lower clusterer\.min_cluster_size \(4\)"),
        (Agglomerative(), r"lower clusterer\.distance_threshold \(0\.8\)"),
        (Infomap(), r"raise clusterer\.min_similarity \(0\.5\)"),
        (KMeans(2), r"raise clusterer\.num_clusters \(2\)"),
    ],
)
def test_the_warning_of_a_large_cluster_names_the_clusterers_options(
    clusterer: FeatureClusterer, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    group = (torch.arange(60) > 45).long()
    feature = torch.eye(2, 8)[group] + 0.05 * torch.randn(60, 8, generator=generator)
    labels = clusterer(feature_set(F.normalize(feature, dim=1)))
    (message,) = caplog.messages
    largest = int(torch.bincount(labels.cluster[labels.cluster >= 0]).max())
    assert re.match(f"one cluster holds {largest} of 60 images: {advice}, or lower solv", message)


def full(graph: scipy.sparse.csr_matrix) -> np.ndarray:
    """The dense distances; pairs that are not stored are 1."""
    distance = np.ones(graph.shape)
    distance[np.repeat(np.arange(len(distance)), np.diff(graph.indptr)), graph.indices] = graph.data
    np.fill_diagonal(distance, 0)
    return distance


@pytest.mark.parametrize(
    "clusterer",
    [
        JaccardDBSCAN(),
        HDBSCAN(min_cluster_size=8),
        Agglomerative(min_cluster_size=8),
        Infomap(min_cluster_size=8, min_similarity=0.3),
    ],
)
def test_every_clusterer_but_k_means_takes_a_graph(clusterer: FeatureClusterer) -> None:
    features, group = grouped()
    found = clusterer.graph_clusters(jaccard_distance(features.test, 15))
    assert adjusted_rand_score(group[:80], found[:80]) == 1


def test_k_means_needs_features() -> None:
    with pytest.raises(ValueError, match="KMeans needs features, not a graph of 85 images"):
        KMeans(4).graph_clusters(jaccard_distance(grouped()[0].test))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.98])
def test_agglomerative_on_a_graph_is_average_linkage(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(90, 6, generator=generator), dim=1)
    graph = jaccard_distance(features, 12)
    tree = linkage(squareform(full(graph), checks=False), "average")
    expected = fcluster(tree, threshold, "distance")
    found = Agglomerative(threshold, min_cluster_size=1).graph_clusters(graph)
    assert adjusted_rand_score(expected, found) == 1


@pytest.mark.parametrize("seed", range(5))
def test_hdbscan_on_a_graph_counts_missing_pairs_as_1(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 8, generator=generator)
    features = centres[torch.arange(90) % 6] + 0.6 * torch.randn(90, 8, generator=generator)
    graph = jaccard_distance(F.normalize(features, dim=1), 12)
    expected = sklearn.cluster.HDBSCAN(
        min_cluster_size=4, min_samples=4, metric="precomputed", copy=True
    ).fit_predict(full(graph))
    found = HDBSCAN().graph_clusters(graph).numpy()
    assert found.max() == expected.max() > 0
    # mutual reachability has many ties, whose order decides about single images
    assert adjusted_rand_score(expected, found) > 0.95


def test_a_connected_graph_has_the_same_distances() -> None:
    features, _ = grouped()
    graph = jaccard_distance(features.test, 5, 1)
    assert connected_components(graph, directed=False)[0] > 1
    assert np.diff(graph.indptr).min() < 6
    joined = _joined_graph(graph, 6)
    assert connected_components(joined, directed=False)[0] == 1
    assert np.diff(joined.indptr).min() >= 6
    assert joined.data.min() > 0
    np.testing.assert_allclose(full(joined), full(graph), atol=1e-11)


def test_outliers_of_a_graph() -> None:
    near = np.array([[0, 0.1, 0.1, 0.6, 1], [0.1, 0, 0.1, 1, 1], [0.1, 0.1, 0, 0.7, 1],
                     [0.6, 1, 0.7, 0, 1], [1, 1, 1, 1, 0]])  # fmt: skip
    rows, columns = np.nonzero(near < 1)
    graph = scipy.sparse.csr_matrix((near[rows, columns], (rows, columns)), near.shape)
    expected = {"drop": [0, 0, 0, -1, -1], "nearest": [0, 0, 0, 0, -1],
                "singleton": [0, 0, 0, 1, 2]}  # fmt: skip
    for policy, labels in expected.items():
        clusterer = JaccardDBSCAN(min_samples=3, outliers=policy)  # type: ignore[arg-type]
        assert clusterer.graph_clusters(graph).tolist() == labels


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((2, 2)), "expected a CSR matrix, got ndarray"),
        (scipy.sparse.csr_matrix((2, 3)), r"expected \(N, N\) with N > 0, got \(2, 3\)"),
        (scipy.sparse.csr_matrix([[0, 2.0], [2, 0]]), "expected numbers from 0 to 1"),
        (scipy.sparse.csr_matrix([[0, np.nan], [np.nan, 0]]), "expected numbers from 0 to 1"),
        (scipy.sparse.csr_matrix([[0, 0.5], [0.4, 0]]), "expected a symmetric matrix"),
    ],
)
def test_a_graph_is_checked(matrix: scipy.sparse.csr_matrix, message: str) -> None:
    with pytest.raises(ValueError, match=f"distances: {message}"):
        JaccardDBSCAN().graph_clusters(matrix)


def test_infomap_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "infomap", None)
    with pytest.raises(ConfigError, match=r"Infomap needs the package infomap .*pip install"):
        Infomap()


def test_infomap_drops_small_clusters() -> None:
    features, _ = grouped()
    every = Infomap(min_cluster_size=1)(features).cluster
    sizes = torch.bincount(every[every >= 0])
    large = Infomap(min_cluster_size=8)(features).cluster
    assert sizes.min() < 8 <= torch.bincount(large[large >= 0]).min()
    assert (large >= 0).sum() == sizes[sizes >= 8].sum()
    with pytest.raises(ClusteringError, match=r"lower clusterer\.min_similarity"):
        Infomap(min_similarity=1.0)(features)


def test_agglomerative_with_equal_images() -> None:
    features = F.normalize(torch.eye(4).repeat_interleave(20, 0) + 1e-8, dim=1)
    labels = Agglomerative(k1=25, k2=3)(feature_set(features))
    assert adjusted_rand_score(torch.arange(4).repeat_interleave(20), labels.cluster) == 1


def test_clusters_are_split_by_camera() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(80) % 4
    camids = torch.arange(80) // 40
    feature = F.normalize(
        torch.randn(4, 16, generator=generator)[group]
        + 0.1 * torch.randn(80, 16, generator=generator),
        dim=1,
    )
    features = feature_set(feature, camids)
    labels = CameraProxyClusterer()(features)
    assert torch.equal(labels.cluster, JaccardDBSCAN()(features).cluster)
    assert labels.num_proxies == 8
    assert labels.proxy_to_cluster.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert labels.proxy_to_camera.tolist() == [0, 1] * 4


@pytest.mark.oracle
def test_proxies_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("cluster_*.npz"))
    assert files
    for path in files:
        a = np.load(path)
        camid = torch.from_numpy(a["camid"]).long()
        features = feature_set(torch.from_numpy(a["feature"]), camid)
        checked = 0
        for name in a.files:
            if not name.startswith("proxy_label_"):
                continue
            parts = name.split("_")
            labels = CameraProxyClusterer(
                k1=int(parts[3]), k2=int(parts[5]), eps=float(parts[7]), min_samples=4
            )(features)
            assert np.array_equal(labels.proxy.numpy(), a[name]), f"{path} {name}"
            centers = name.replace("proxy_label", "proxy_center")
            if centers in a.files:
                memory = ProxyMemory(0.2)
                memory.reset(labels.proxy, labels.num_proxies, features)
                np.testing.assert_allclose(memory.rows[0].numpy(), a[centers], atol=1e-6)
                checked += 1
        assert checked
