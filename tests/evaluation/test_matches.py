from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from reid.evaluation.matches import (
    Match,
    cluster_confidence,
    cross_camera_matches,
    write_clusters,
    write_matches,
)
from reid.structures import FeatureSet, ImageRecord


def direction(degrees: float) -> list[float]:
    angle = torch.deg2rad(torch.tensor(degrees))
    return [float(angle.cos()), float(angle.sin())]


def features(degrees: list[float], camids: list[int]) -> FeatureSet:
    feature = torch.tensor([direction(value) for value in degrees])
    return FeatureSet.of(feature, camids=torch.tensor(camids))


def test_confidence_worked_out_by_hand() -> None:
    rows = torch.tensor([direction(value) for value in (0, 20, 90, 110, 200)])
    found = cluster_confidence(rows, torch.tensor([4, 4, 7, 7, -1]))

    def cosine(value: float) -> float:
        return direction(value)[0]

    # the image at 20 degrees: its cluster without it lies at 0, the other one at 100
    own, other = 1 - cosine(20), 1 - cosine(80)
    assert found[1] == pytest.approx((other - own) / other, abs=1e-5)
    own, other = 1 - cosine(20), 1 - cosine(100)
    assert found[0] == pytest.approx((other - own) / other, abs=1e-5)
    assert found[4] == 0


def test_confidence_where_there_is_little_to_compare() -> None:
    rows = torch.tensor([direction(value) for value in (0, 20, 90)])
    assert cluster_confidence(rows, torch.tensor([0, 0, 0])).tolist() == [1, 1, 1]
    assert cluster_confidence(rows, torch.tensor([-1, -1, -1])).tolist() == [0, 0, 0]
    alone = cluster_confidence(rows, torch.tensor([0, 0, 1]))
    assert alone[2] == 0
    assert (alone[:2] > 0.5).all()
    # nearer to another cluster than to its own
    rows = torch.tensor([direction(value) for value in (0, 90, 91, 2)])
    assert cluster_confidence(rows, torch.tensor([0, 0, 1, 1]))[1] == 0
    same = torch.tensor([direction(3)] * 4)
    assert cluster_confidence(same, torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


def test_confidence_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(50, 8, generator=generator), dim=1)
    cluster = torch.randint(-1, 6, (50,), generator=generator)
    whole = cluster_confidence(rows, cluster)
    monkeypatch.setattr("reid.evaluation.matches._BLOCK", 7)
    torch.testing.assert_close(cluster_confidence(rows, cluster), whole)


def test_matches_are_mutual_and_cross_cameras() -> None:
    found = features([0, 1, 3, 50, 58, 120], [0, 0, 1, 1, 2, -1])
    # 1 and 2 are mutual; 0's nearest is 2, which prefers 1; 3 and 4 are mutual; 5 has no camera
    matches = cross_camera_matches(found, 10)
    assert [(match.first, match.second) for match in matches] == [(1, 2), (3, 4)]
    assert matches[0].similarity == pytest.approx(direction(2)[0])
    assert cross_camera_matches(found, 1) == matches[:1]
    assert cross_camera_matches(features([0, 1], [3, 3]), 5) == []
    assert cross_camera_matches(features([0, 1], [-1, -1]), 5) == []
    readable = replace(found, present=torch.tensor([False, True, False, True, True, True]))
    assert cross_camera_matches(readable, 10) == matches[1:]
    with pytest.raises(ValueError, match="most: expected 1 or more, got 0"):
        cross_camera_matches(found, 0)


def test_files(tmp_path: Path) -> None:
    records = [
        ImageRecord("a, b.jpg", camid=1, extra={"camera": "Haupteingang Süd"}),
        ImageRecord("b.jpg", camid=2),
        ImageRecord("c.jpg", camid=-1),
        ImageRecord("d.jpg", camid=0),
    ]
    cluster = torch.tensor([1, 0, -1, 1])
    write_clusters(tmp_path / "c.csv", records, cluster, torch.tensor([0.25, 0.5, 0.0, 0.75]))
    with (tmp_path / "c.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ["path", "cluster", "camera", "confidence"],
        ["b.jpg", "0", "2", "0.5000"],
        ["d.jpg", "1", "0", "0.7500"],
        ["a, b.jpg", "1", "Haupteingang Süd", "0.2500"],
        ["c.jpg", "-1", "", ""],
    ]
    write_matches(tmp_path / "m.csv", records, [Match(0, 3, 0.9), Match(0, 1, 0.5)], cluster)
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[1] == ["a, b.jpg", "d.jpg", "Haupteingang Süd", "0", "0.9000", "1"]
    assert rows[2][5] == ""
