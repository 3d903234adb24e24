from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils.data import default_collate

from reid.structures import (
    Batch,
    DataError,
    FeatureSet,
    ImageRecord,
    PseudoLabels,
    finite_rows,
)


def test_records_are_frozen_and_checked():
    record = ImageRecord("a.jpg", 3, 0)
    with pytest.raises(AttributeError):
        record.pid = 4
    with pytest.raises(DataError, match=r"b\.jpg.*camid -2"):
        ImageRecord("b.jpg", 3, -2)
    assert pickle.loads(pickle.dumps(record)) == record


def test_collate_keeps_the_batch_type():
    side = {"view": torch.tensor(2.0)}
    zero, seven = torch.tensor(0), torch.tensor(7)
    row = Batch(torch.zeros(3, 4, 2), zero, zero, seven, side, (torch.ones(3, 4, 2),))
    batch = default_collate([row, row])
    assert isinstance(batch, Batch)
    assert batch.side["view"].tolist() == [2, 2]
    assert batch.views[0].shape == (2, 3, 4, 2)
    assert batch.image.shape == (2, 3, 4, 2)
    assert batch.index.tolist() == [7, 7]


def test_proxies_are_numbered_by_cluster_then_camera():
    cluster = torch.tensor([1, 0, 1, 0, -1, 1])
    camids = torch.tensor([2, 5, 0, 5, 1, 2])
    labels = PseudoLabels.from_clusters(cluster, camids)
    assert labels.proxy.tolist() == [2, 0, 1, 0, -1, 2]
    assert labels.proxy_to_cluster.tolist() == [0, 1, 1]
    assert labels.proxy_to_camera.tolist() == [5, 0, 2]
    assert (labels.num_clusters, labels.num_proxies, labels.num_outliers) == (2, 3, 1)


def test_gaps_in_cluster_ids_are_closed():
    labels = PseudoLabels.from_clusters(torch.tensor([7, 3, -1, 7]))
    assert labels.cluster.tolist() == [1, 0, -1, 1]
    assert labels.proxy.tolist() == [1, 0, -1, 1]
    assert labels.proxy_to_camera.tolist() == [-1, -1]


def test_unknown_cameras_are_a_group_of_their_own():
    labels = PseudoLabels.from_clusters(torch.tensor([0, 0, 0]), torch.tensor([-1, 3, -1]))
    assert labels.proxy.tolist() == [0, 1, 0]
    assert labels.proxy_to_camera.tolist() == [-1, 3]


def test_all_outliers_and_no_images_are_valid_labels():
    for n in (0, 3):
        labels = PseudoLabels.from_clusters(torch.full((n,), -1), torch.zeros(n, dtype=torch.int64))
        assert (labels.num_clusters, labels.num_proxies, labels.num_outliers) == (0, 0, n)


@pytest.mark.parametrize(
    ("cluster", "proxy", "to_cluster", "to_camera", "message"),
    [
        ([0, -1], [0, 0], [0], [0], "an outlier"),
        ([0, 0], [0, 2], [0, 0, 0], [0, 1, 2], "each of 0..2"),
        ([0, 1], [0, 1], [1, 0], [0, 0], "the image's cluster"),
        ([0, 0], [0, 0], [0], [0, 1], "proxy_to_camera must be int64 of shape"),
        ([0, -2], [0, -1], [0], [0], "-1 or more"),
    ],
)
def test_labels_that_do_not_fit_are_refused(cluster, proxy, to_cluster, to_camera, message):
    with pytest.raises(ValueError, match=message):
        PseudoLabels(*map(torch.tensor, (cluster, proxy, to_cluster, to_camera)))


def test_batches_hold_no_identities():
    assert Batch._fields == ("image", "camid", "domain", "index", "side", "views", "maps")


def test_a_batch_without_pixels_keeps_its_lengths():
    batch = Batch.of(torch.rand(3, 3, 4, 2))._replace(views=(torch.rand(3, 3, 4, 2),))
    bare = batch.without_pixels().to(torch.device("cpu"))
    assert bare.image.shape == bare.views[0].shape == (3, 0)
    assert bare.index.tolist() == [0, 1, 2]
    assert bare.camid.tolist() == [-1, -1, -1]


def test_feature_sets_are_checked_and_sliced():
    ids, test = torch.arange(4), torch.rand(4, 8)
    features = FeatureSet.of(test, ids, unit=torch.rand(4, 5, 6), present=ids > 0)
    assert len(features) == 4
    assert features[1:3].pids.tolist() == [1, 2]
    assert features[ids[:1]].present.tolist() == [False]
    assert features.camids.tolist() == features.frames.tolist() == [-1] * 4
    assert torch.equal(FeatureSet.of(test).unit[:, 0], test)
    with pytest.raises(ValueError, match=r"unit must be \(4, 1 \+ K, D\)"):
        FeatureSet.of(test, unit=torch.rand(3, 5, 8))
    with pytest.raises(ValueError, match="pids must be int64"):
        FeatureSet.of(test, ids.float())
    with pytest.raises(ValueError, match="present must be bool"):
        FeatureSet.of(test, present=ids)


def test_labels_scattered_among_more_images() -> None:
    labels = PseudoLabels.from_clusters(torch.tensor([1, -1, 0]), torch.tensor([0, 0, 1]))
    placed = labels.scatter(torch.tensor([4, 0, 2]), 6)
    assert placed.cluster.tolist() == [-1, -1, 0, -1, 1, -1]
    assert placed.proxy.tolist() == [-1, -1, 0, -1, 1, -1]
    assert placed.num_outliers == 4
    assert torch.equal(placed.proxy_to_camera, labels.proxy_to_camera)


def test_what_a_labeller_tells_losses_goes_along() -> None:
    labels = PseudoLabels.from_clusters(torch.tensor([0, 1, -1]))
    told = replace(labels, side={"weight": torch.arange(6.0).view(3, 2)})
    assert torch.equal(told.to(torch.device("cpu")).side["weight"], told.side["weight"])
    spread = told.scatter(torch.tensor([0, 2, 3]), 5).side["weight"]
    assert torch.equal(spread[[0, 2, 3]], told.side["weight"])
    assert not spread[[1, 4]].any()
    with pytest.raises(ValueError, match="side 'weight' must have 3 rows, got 2"):
        replace(labels, side={"weight": torch.zeros(2)})


def test_features_of_images_that_follow_each_other_are_not_copied() -> None:
    features = FeatureSet.of(torch.rand(6, 3), torch.arange(6), unit=torch.rand(6, 2, 3))
    rows = torch.arange(6)
    for chosen in (rows[2:5], (rows > 1) & (rows < 5), slice(2, 5)):
        part = features[chosen]
        assert part.pids.tolist() == [2, 3, 4]
        assert part.unit.data_ptr() == features.unit[2].data_ptr()
        assert torch.equal(part.test, features.test[2:5])
    for other in ([4, 3], [0, 2], [2, 2], [-2, -1], []):
        part = features[torch.tensor(other, dtype=torch.int64)]
        assert torch.equal(part.unit, features.unit[torch.tensor(other, dtype=torch.int64)])
        assert not len(other) or part.unit.data_ptr() != features.unit[other[0]].data_ptr()


def test_rows_that_are_not_finite_are_found_in_every_part() -> None:
    values = torch.zeros(2500, 2, 3)
    values[3, 1, 2], values[1024, 0, 0], values[2499, 1, 0] = torch.inf, -torch.inf, torch.nan
    assert (~finite_rows(values)).nonzero()[:, 0].tolist() == [3, 1024, 2499]
    assert finite_rows(values[:, 0, :2]).logical_not().nonzero()[:, 0].tolist() == [1024]
    assert finite_rows(torch.zeros(0, 4)).tolist() == []
