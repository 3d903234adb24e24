"""Clusters inside cameras, cut by time, and their merging across cameras."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.labelling import (
    BankClusterer,
    CameraClusterer,
    ClusteringError,
    CrossCameraMerger,
    JaccardDBSCAN,
    KMeans,
    RerankedDBSCAN,
    camera_clusterers,
)
from reid.labelling.camera_clusterers import cut_at_gaps, merge_across_cameras
from reid.registry import CLUSTERER, build
from reid.structures import OUTLIER, FeatureSet

PERSONS = torch.arange(72) % 6
CAMIDS = torch.arange(72) // 24


def seen(persons: Tensor = PERSONS, camids: Tensor = CAMIDS, shift: float = 0.5) -> FeatureSet:
    """Persons whose features are shifted by each camera."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(int(persons.max()) + 1, 16, generator=generator)
    style = torch.randn(3, 16, generator=generator)
    noise = 0.2 * torch.randn(len(persons), 16, generator=generator)
    test = F.normalize(centres[persons] + shift * style[camids] + noise, dim=1)
    return FeatureSet.of(test, camids=camids, frames=torch.arange(len(persons)))


def same(labels: Tensor) -> Tensor:
    return labels[:, None] == labels


def inner(k1: int = 4) -> JaccardDBSCAN:
    """Lists as long as the number of images of a person in a camera."""
    return JaccardDBSCAN(k1=k1, k2=2, eps=0.7, min_samples=2)


def test_clusters_of_each_camera_alone() -> None:
    labels = CameraClusterer(inner())(seen())
    assert labels.num_clusters == labels.num_proxies == 18
    assert torch.equal(same(labels.cluster), same(PERSONS) & same(CAMIDS))
    assert (labels.proxy_to_camera[labels.proxy] == CAMIDS).all()


def test_counterparts_merge() -> None:
    merger = CrossCameraMerger(CameraClusterer(inner()), threshold=0.3)
    labels = merger(seen())
    assert torch.equal(same(labels.cluster), same(PERSONS))
    assert labels.num_proxies == 18
    assert merger.choices == {"in_cameras": 18}
    strict = CrossCameraMerger(CameraClusterer(inner()), threshold=1.0)(seen())
    assert strict.num_clusters == 18


def test_clusters_cut_at_pauses() -> None:
    cluster = torch.tensor([0, 0, 1, 0, 0, -1, 1, 1])
    frames = torch.tensor([5, 6, 5, 40, 30, 7, 5, 90])
    assert cut_at_gaps(cluster, frames, 10).tolist() == [0, 0, 2, 1, 1, -1, 2, 3]
    assert cut_at_gaps(cluster, frames, 100).tolist() == cluster.tolist()
    assert cut_at_gaps(cluster, frames, 10, 2).tolist() == [0, 0, 2, 1, 1, -1, 2, -1]
    nothing = torch.full((3,), OUTLIER)
    assert cut_at_gaps(nothing, torch.arange(3), 1).tolist() == [OUTLIER] * 3


def test_time_keeps_look_alikes_apart() -> None:
    lookalikes = PERSONS // 2  # two persons with the same clothes
    features = seen(lookalikes)
    frames = torch.where(PERSONS % 2 == 0, 0, 5000) + torch.arange(72)
    features = FeatureSet.of(features.test, camids=CAMIDS, frames=frames)
    blind = CameraClusterer(inner(8))(features)
    assert torch.equal(same(blind.cluster), same(lookalikes) & same(CAMIDS))
    labels = CameraClusterer(inner(8), max_gap=100)(features)
    assert torch.equal(same(labels.cluster), same(PERSONS) & same(CAMIDS))


def test_images_without_frame_or_camera() -> None:
    features = seen()
    unknown = FeatureSet.of(features.test, camids=CAMIDS)
    with pytest.raises(ClusteringError, match="frame number of each image, but 72 of 72 have none"):
        CameraClusterer(inner(), max_gap=5)(unknown)
    everywhere = CameraClusterer(inner())(FeatureSet.of(features.test))
    assert torch.equal(everywhere.cluster, inner()(features).cluster)
    alone = CrossCameraMerger(inner())(FeatureSet.of(features.test))
    assert torch.equal(alone.cluster, everywhere.cluster), "one camera has no counterparts"


def test_a_camera_without_clusters(caplog: pytest.LogCaptureFixture) -> None:
    camids = CAMIDS.clone()
    camids[0] = 7
    labels = CameraClusterer(inner())(_with(camids))
    assert labels.cluster[0] == OUTLIER
    assert "1 of 4 cameras have no cluster (7)" in caplog.text
    with pytest.raises(ClusteringError, match="no camera of 72 images has a cluster"):
        CameraClusterer(JaccardDBSCAN(eps=0.1, min_samples=30))(seen())


def _with(camids: Tensor) -> FeatureSet:
    return FeatureSet.of(seen().test, camids=camids)


@pytest.mark.parametrize("rows", [1, 5, 1024])
def test_merging_by_any_affinity(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_clusterers, "_ROWS", rows)
    # 0, 1 in camera 3; 2, 3 in camera 5; 4 in camera 9
    affinity = np.eye(5, dtype=np.float32)
    for i, j, value in ((0, 2, 0.9), (1, 2, 0.8), (1, 3, 0.7), (0, 1, 0.99), (3, 4, 0.2)):
        affinity[i, j] = affinity[j, i] = value
    cameras = np.array([3, 3, 5, 5, 9])

    def merged(threshold: float) -> list[int]:
        return merge_across_cameras(lambda which: affinity[which], cameras, threshold).tolist()

    assert merged(0.5) == [0, 1, 0, 2, 3], "1 and 3 are not each other's most alike"
    affinity[1, 2] = affinity[2, 1] = 0.1
    assert merged(0.5) == [0, 1, 0, 1, 2]
    assert merged(0.1) == [0, 1, 0, 1, 1]
    assert merged(0.95) == [0, 1, 2, 3, 4]


def test_parts_of_a_config() -> None:
    dbscan = {"name": "JaccardDBSCAN", "k1": 4, "k2": 2, "eps": 0.7, "min_samples": 2}
    local = {"name": "CameraClusterer", "clusterer": dbscan}
    spec = {"name": "CrossCameraMerger", "threshold": 0.3, "clusterer": local}
    labels = build(CLUSTERER, spec, "clusterer")(seen())
    assert torch.equal(same(labels.cluster), same(PERSONS))
    with pytest.raises(ValueError, match="RerankedDBSCAN keeps a state"):
        CameraClusterer(RerankedDBSCAN())
    assert not CrossCameraMerger(KMeans(3)).uses_source
    reranked = CrossCameraMerger(RerankedDBSCAN(4, 2, rho=0.05, min_samples=2))
    reranked(seen())
    state = reranked.state_dict()
    assert state["eps"] > 0
    again = CrossCameraMerger(RerankedDBSCAN(4, 2, rho=0.05, min_samples=2))
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert CrossCameraMerger(BankClusterer(KMeans(3))).state_dict() == {}
