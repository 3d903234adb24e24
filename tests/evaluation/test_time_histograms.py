"""Spatial-temporal histograms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reid.evaluation.time_histograms import TimeHistograms, count_times, joint_score


def test_counts_by_hand():
    """Person 0: cameras 2 and 7, means 150 and 900; person 1: camera 7 alone, three images."""
    labels = np.array([0, 0, 0, 1, 1, 1, -1])
    camids = np.array([2, 2, 7, 7, 7, 7, 4])
    frames = np.array([100, 200, 900, 50, 149, 151, -1])
    counted = count_times(labels, camids, frames, num_bins=8)
    assert counted.cameras.tolist() == [2, 4, 7]
    expected = np.zeros((3, 3, 8))
    expected[2, 0, 7] = 1  # later: camera 7, 750 frames after camera 2
    assert np.array_equal(counted.table, expected)
    visits = count_times(labels, camids, frames, num_bins=8, same_camera="visits")
    expected[0, 0, :2] = 2, 2
    expected[2, 2, :2] = 6, 3
    assert np.array_equal(visits.table, expected)


def test_two_visits_count_once_and_an_edge_belongs_to_the_lower_bin():
    """As published: the mean of all times, divided by the number of images + 1e-7."""
    labels, camids = np.zeros(3, np.int64), np.array([0, 0, 1])
    twice = count_times(labels, camids, np.array([0, 900, 1000]), num_bins=8).table
    assert twice[1, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]  # 1000 - 450
    assert twice.sum() == 1
    edge = count_times(labels[1:], camids[1:], np.array([100, 300]), num_bins=8).table
    assert edge[1, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]  # 200, a hair less


def test_of_equal_times_the_higher_camera_is_later():
    table = count_times(np.array([3, 3]), np.array([1, 0]), np.array([5, 5]), num_bins=2).table
    assert table[1, 0].tolist() == [1, 0]
    assert table[0, 1].tolist() == [0, 0]


def test_times_beyond_the_last_bin_are_left_out():
    labels, camids = np.array([0, 0, 0, 0]), np.array([0, 0, 1, 1])
    frames = np.array([0, 10**7, 0, 10**12])
    counted = count_times(labels, camids, frames, num_bins=3, same_camera="visits")
    assert counted.table[0, 0].tolist() == [2, 0, 0]
    assert counted.table.sum() == 4
    model = counted.normalised()
    seen = model.shares(camids, frames, np.array([0, 1, 9]), np.array([0, 10**15, 0]))
    assert seen.shape == (4, 3)
    assert not seen[:, 1:].any()  # too long ago; an unknown camera
    assert seen[0, 0] == pytest.approx(1)


def test_nothing_seen_gives_zeros():
    none = np.zeros(0, np.int64)
    assert count_times(none, none, none, num_bins=4).smoothed(1).shares(
        np.array([1]), np.array([2]), np.array([1]), np.array([2])
    ) == np.zeros((1, 1))
    outliers = count_times(np.array([-1]), np.array([3]), np.array([-1]), num_bins=4)
    assert not outliers.smoothed(2).table.any()


def test_shares_are_by_the_order_of_the_times():
    table = np.zeros((2, 2, 2))
    table[0, 1], table[1, 0], table[1, 1] = (0.1, 0.2), (0.3, 0.4), (0.5, 0.6)
    model = TimeHistograms(np.array([3, 8]), table, 10)
    shares = model.shares(np.array([3, 8]), np.array([25, 25]), np.array([8]), np.array([10]))
    assert shares[:, 0].tolist() == [0.2, 0.6]  # both later than the other, by one bin
    shares = model.shares(np.array([3]), np.array([5]), np.array([8]), np.array([9]))
    assert shares.tolist() == [[0.3]]  # earlier: the other camera is the later one


def test_wrong_arguments():
    one = np.array([0])
    with pytest.raises(ValueError, match="1 of 1 labelled images have no frame number"):
        count_times(one, one, np.array([-1]), num_bins=3)
    with pytest.raises(ValueError, match="num_bins and width of 1 or more, got 0, 100"):
        count_times(one, one, one, num_bins=0)


@pytest.mark.oracle
def test_histograms_of_mgh(oracle_dir: Path):
    files = sorted(oracle_dir.glob("mgh_spatiotemporal*.npz"))
    assert files
    for path in files:
        a = np.load(path)
        camids, frames, score = a["camid"], a["frame"], a["score"].astype(float)
        model = count_times(
            a["cluster_label"], camids, frames, num_bins=int(a["num_bins"]),
            width=int(a["bin"]), same_camera="visits",
        ).smoothed(float(a["sigma"]))  # fmt: skip
        # the published table has the cameras from 1 on by number; empty ones are zeros
        expected = a["distribution"]
        assert model.table[..., expected.shape[2] :].sum() == 0
        places = model.cameras - 1
        part = expected[np.ix_(places, places)]
        assert np.abs(model.table[..., : expected.shape[2]] - part).max() < 1e-9, path
        share = model.shares(camids, frames, camids, frames)
        joint = 1 - joint_score(score.clip(-1, 1), share)
        assert np.abs(joint - a["joint_distance"]).max() < 1e-5, path


@pytest.mark.oracle
def test_histograms_of_st_reid(oracle_dir: Path):
    files = [path for path in oracle_dir.glob("streid_*.npz") if "train_pid" in np.load(path)]
    assert files
    for path in files:
        a = np.load(path)
        counted = count_times(
            a["train_pid"], a["train_cam"], a["train_frame"], num_bins=int(a["bins"]),
            width=int(a["interval"]),
        )  # fmt: skip
        places, shares = counted.cameras - 1, counted.normalised()
        assert np.abs(shares.table - a["histogram"][np.ix_(places, places)]).max() < 1e-6, path
        model = shares.smoothed(float(a["smooth"]))
        assert np.abs(model.table - a["smoothed"][np.ix_(places, places)]).max() < 1e-6, path
        share = model.shares(a["query_cam"], a["query_frame"], a["gallery_cam"], a["gallery_frame"])
        score = joint_score(a["query_feature"] @ a["gallery_feature"].T, share, float(a["alpha"]))
        assert np.abs(score - a["joint_score"]).max() < 1e-6, path
