from __future__ import annotations

from typing import Any

import pytest

import reid.projects.cap  # noqa: F401  (registers CameraProxyClusterer)
from reid.workflows.report.course import (
    judge_camera_pairs,
    judge_losses,
    judge_queries,
    judge_results,
    judge_speed,
)
from reid.workflows.report.health import (
    Finding,
    SplitData,
    judge_clusters,
    judge_single_camera,
)

WELL = {
    "clusters": 100, "proxies": 300, "outliers": 100, "images/cluster": 9.0, "largest": 30,
    "cross-camera": 0.9, "silhouette": 0.2, "agreement": 0.95, "purity": 0.9,
}  # fmt: skip
DBSCAN = {"NAME": "JaccardDBSCAN", "EPS": 0.5}


def judge(
    last: dict[str, float], first: dict[str, float] | None = None, **options: Any
) -> list[Finding]:
    clusterer = options.get("clusterer", DBSCAN)
    data = options.get("data", SplitData(6, 100))
    return judge_clusters([WELL | (first or {}), WELL | last], clusterer, data)


def one(found: list[Finding], words: str) -> Finding:
    (finding,) = [finding for finding in found if words in finding.text]
    return finding


def test_healthy_clusters_are_called_healthy() -> None:
    found = judge({})
    assert {finding.level for finding in found} == {"good"}
    assert not any(finding.hint for finding in found)
    assert "100 of 1,000 images (10 %) are in none" in one(found, "clusters of").text


@pytest.mark.parametrize(
    ("last", "words", "level", "hint"),
    [
        ({"outliers": 1200}, "(57 %) are in none", "look", "raise CLUSTERER.EPS (now 0.5)"),
        ({"outliers": 9100}, "(91 %) are in none", "bad", "MODEL.BACKBONE_WEIGHTS"),
        ({"outliers": 300}, "Outliers grow: 10 %", "look", "SOLVER.BASE_LR"),
        ({"largest": 400}, "One cluster holds 40 %", "bad", "lower CLUSTERER.EPS (now 0.5)"),
        ({"cross-camera": 0.59}, "split by camera: 41 %", "look", "CameraProxyClusterer"),
        ({"cross-camera": 0.4}, "split by camera: 60 %", "bad", "raise CLUSTERER.EPS"),
        ({"agreement": 0.3}, "still change much", "look", "SOLVER.MAX_EPOCHS"),
        ({"silhouette": -0.1}, "Clusters overlap", "look", "picture of clusters"),
        ({"purity": 0.6}, "mix persons: 40 %", "look", "lower CLUSTERER.EPS"),
        ({"clusters": 200, "images/cluster": 4.5}, "persons are split", "look", "raise CLUSTERER"),
        ({"clusters": 50, "images/cluster": 18.0}, "persons are joined", "look", ""),
        ({"kept": 1}, "In 1 of 2 epochs", "bad", "warnings"),
        ({"clusters": 1}, "has 1 clusters", "bad", "lower CLUSTERER.EPS"),
    ],
)
def test_a_problem_is_named_with_a_remedy(
    last: dict[str, float], words: str, level: str, hint: str
) -> None:
    finding = one(judge(last), words)
    assert finding.level == level
    assert hint in finding.hint


def test_bounds_are_where_the_page_says() -> None:
    assert one(judge({"cross-camera": 0.75}), "split by camera").level == "good"
    assert one(judge({"outliers": 900}), "clusters of").level == "good"  # half of the images
    assert not [f for f in judge({"largest": 333}) if "One cluster" in f.text]


def test_no_split_by_camera_is_not_called_one() -> None:
    unsplit = {"proxies": 100, "cross-camera": 0.0}
    assert not [f for f in judge(unsplit, unsplit) if "camera" in f.text]
    one_camera = judge({"cross-camera": 0.0}, data=SplitData(1, 0))
    assert not [f for f in one_camera if "camera" in f.text]


def test_unknown_persons_are_not_counted() -> None:
    assert not [f for f in judge({"clusters": 500}, data=SplitData(6, 0)) if "persons" in f.text]


@pytest.mark.parametrize(
    ("clusterer", "hint"),
    [
        ({"NAME": "KMeans", "NUM_CLUSTERS": 7}, "raise CLUSTERER.NUM_CLUSTERS (now 7)"),
        ({"NAME": "HDBSCAN"}, "lower CLUSTERER.MIN_CLUSTER_SIZE;"),
        ({"NAME": "Mine"}, "try other options of Mine"),
        ({}, "try other options of the clusterer"),
    ],
)
def test_hints_fit_the_clusterer(clusterer: dict[str, Any], hint: str) -> None:
    assert hint in one(judge({"largest": 400}, clusterer=clusterer), "One cluster").hint


def test_hints_name_options_that_clusterers_have() -> None:
    import inspect

    from reid.registry import CLUSTERER
    from reid.workflows.report.health import _WAYS

    for name, ways in _WAYS.items():
        options = inspect.signature(CLUSTERER.get(name).__init__).parameters
        for _, option in ways:
            assert option.lower() in options, f"{name}.{option}"


@pytest.mark.parametrize("broken", [{}, {"clusters": float("nan")}, {"clusters": 5}])
def test_broken_statistics_do_no_harm(broken: dict[str, float]) -> None:
    judge_clusters([broken, broken], {}, SplitData())
    assert judge_clusters([], {}, SplitData()) == []


def test_losses() -> None:
    assert judge_losses([], supervised=True) == []
    assert judge_losses([3, 2, 1], supervised=True)[0].level == "good"
    assert judge_losses([1, 2, 3], supervised=True)[0].level == "look"
    (note,) = judge_losses([1, 2, 3], supervised=False)
    assert (note.level, note.hint) == ("note", "")
    assert judge_losses([3, float("nan"), 1], supervised=True)[0].level == "bad"
    assert "2 reports" in judge_losses([3, 2], supervised=True, skipped=2)[0].text


def test_waiting_for_images() -> None:
    assert judge_speed([], [], 4) == []
    assert judge_speed([0.1], [1.0], 4) == []
    (finding,) = judge_speed([0.5, 0.3], [1.0, 1.0], 4)
    assert "40 %" in finding.text
    assert "(now 4)" in finding.hint
    assert "(now" not in judge_speed([0.5], [1.0], None)[0].hint


def test_results() -> None:
    assert judge_results("Set", [(3, 0.5)], "mAP") == []
    (gain,) = judge_results("Set", [(0, 0.5), (3, 0.6)], "mAP")
    assert gain.level == "good"
    assert "from 50.0 % before training to 60.0 % after epoch 3" in gain.text
    (loss,) = judge_results("Set", [(1, 0.6), (3, 0.6)], "mAP")
    assert loss.level == "bad"
    _, best = judge_results("Set", [(0, 0.5), (2, 0.65), (3, 0.6)], "mAP")
    assert "5.0 points higher after epoch 2" in best.text
    assert "SOLVER.MAX_EPOCHS 2" in best.hint


def test_queries_and_cameras() -> None:
    assert judge_queries("Set", []) == []
    assert judge_queries("Set", [0.05] + 9 * [0.5]) == []
    assert "2 of 10 queries" in judge_queries("Set", 2 * [0.05] + 8 * [0.5])[0].text
    (worst,) = judge_camera_pairs("Set", [0, 1], [0, 1], [[None, 0.8], [0.1, 0.9]])
    assert "From camera 1 to camera 0" in worst.text
    assert judge_camera_pairs("Set", [0, 1], [0, 1], [[None, 0.8], [0.5, 0.9]]) == []
    assert judge_single_camera(41, 100, 6)[0].text == (
        "Clusters split by camera: 41 % hold images of one camera only."
    )
    assert judge_single_camera(1, 100, 1) == []
