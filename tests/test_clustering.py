from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reid.clustering import ClusteringError, JaccardDBSCAN, cluster_statistics
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
        match=r"none of 30 images has 9 neighbours .* eps = 0\.05; raise clusterer\.eps, lower",
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
    }
    pids = torch.tensor([5, 5, 6, 7, 7, 7, -1])
    numbers = cluster_statistics(labels, pids)
    assert numbers["purity"] == pytest.approx(4 / 5)
    assert 0 < numbers["ARI"] < 1
    nothing = PseudoLabels.from_clusters(torch.full((3,), -1))
    assert cluster_statistics(nothing, torch.zeros(3, dtype=torch.int64))["images/cluster"] == 0
