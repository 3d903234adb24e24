from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reid.clustering import (
    HDBSCAN,
    Agglomerative,
    ClusteringError,
    FeatureClusterer,
    JaccardDBSCAN,
    KMeans,
    cluster_statistics,
    cluster_warning,
)
from reid.structures import FeatureSet, PseudoLabels


def feature_set(features: torch.Tensor, camids: torch.Tensor | None = None) -> FeatureSet:
    count = len(features)
    return FeatureSet(
        features,
        torch.zeros(count, 0, features.shape[1]),
        torch.full((count,), -1),
        torch.zeros(count, dtype=torch.int64) if camids is None else camids,
    )


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
        match=r"among 30 images: none has 9 neighbours .* eps = 0\.05; raise clusterer\.eps, lower",
    ):
        JaccardDBSCAN(eps=0.05, min_samples=9)(feature_set(features))


def test_one_image_is_a_cluster_where_one_is_enough() -> None:
    labels = JaccardDBSCAN(min_samples=1)(feature_set(torch.ones(1, 1)))
    assert labels.cluster.tolist() == [0]


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"eps": 1.0}, {"k1": 0}, {"min_samples": 0}])
def test_ranges(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        JaccardDBSCAN(**options)  # type: ignore[arg-type]


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
    ],
    ids=["dbscan", "dbscan, hnsw", "dbscan, ivf", "hdbscan", "agglomerative"],
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
    with pytest.raises(ValueError, match="num_clusters: expected at most the number of images, 85"):
        KMeans(num_clusters=86)(features)


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
    nearest = features.global_feat[lost] @ features.global_feat[~lost].T
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


def test_health_of_features_and_of_the_last_epoch() -> None:
    features, group = grouped()
    labels = JaccardDBSCAN(k1=15)(features)
    numbers = cluster_statistics(labels, group, features, labels.cluster)
    assert numbers["agreement"] == 1
    assert numbers["silhouette"] > 0.5
    assert numbers["NMI"] == pytest.approx(1)
    shuffled = labels.cluster[torch.randperm(85, generator=torch.Generator().manual_seed(0))]
    assert cluster_statistics(labels, group, features, shuffled)["agreement"] < 0.2


def test_warnings_say_what_to_change() -> None:
    healthy = {"outliers": 10, "largest": 5}
    assert cluster_warning(healthy, 100) is None
    assert "raise clusterer.eps" in str(cluster_warning({"outliers": 95, "largest": 5}, 100))
    assert "lower clusterer.eps" in str(cluster_warning({"outliers": 0, "largest": 40}, 100))
