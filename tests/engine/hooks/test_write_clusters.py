"""Training on unlabelled crops from a user's cameras, from start to finish."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reid.config import load_config
from reid.data.datasets import SyntheticPersons
from reid.data.export import export_crops
from reid.labelling import ClusteringError
from reid.registry import CLUSTERER, ConfigError
from reid.structures import FeatureSet, PseudoLabels
from reid.workflows.pictures import picture_cluster_embedding, picture_clusters
from reid.workflows.train import train
from reid.workflows.trained import load_trained

OWN = """
DATASETS: {TRAIN: {NAME: Folder, PATH: shop}, TEST: [{NAME: CSV, PATH: shop/labels.csv}]}
INPUT: {SIZE: [64, 32], TRANSFORMS: [RandomFlip]}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {NAME: PKSampler, BATCH_SIZE: 16, STEPS_PER_EPOCH: 2}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CRITERION: [Triplet]
CLUSTERER: {NAME: JaccardDBSCAN, K1: 6, K2: 2, EPS: 0.8, MIN_SAMPLES: 2}
SOLVER: {OPTIMIZER: Adam, MAX_EPOCHS: 1, WARMUP_EPOCHS: 0, MILESTONES: []}
HOOKS: [{NAME: WriteClusters, NUM_MATCHES: 5}]
DEVICE: cpu
"""


@CLUSTERER.register()
class ClustersOnce:
    """Gives clusters in the first epoch, and none later."""

    def __init__(self) -> None:
        self._asked = 0

    def __call__(self, features: FeatureSet, progress: Any) -> PseudoLabels:
        self._asked += 1
        if self._asked > 1:
            raise ClusteringError("no cluster: raise eps")
        return PseudoLabels.from_clusters(torch.arange(len(features)) % 6)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path / "datasets"))
    persons = SyntheticPersons(
        num_train=8, num_test=5, num_cameras=3, num_distractors=4, height=32, width=16
    )
    export_crops(persons, tmp_path / "datasets" / "shop", labelled=True)
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path / "own.yaml"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        return list(csv.DictReader(stream))


def test_files_for_judging_the_clusters(file: Path, tmp_path: Path) -> None:
    output, shop = tmp_path / "run", tmp_path / "datasets" / "shop"
    if sys.platform == "linux":  # which allows any bytes in names
        labelled = {shop / row["path"] for row in rows(shop / "labels.csv")}
        other = next(path for path in shop.glob("*/*.jpg") if path not in labelled)
        other.rename(other.with_name(os.fsdecode(b"lat-\xe9.jpg")))
    train(load_config(file, ["OUTPUT_DIR", str(output)]))
    clusters = rows(output / "clusters.csv")
    images = sorted(shop.glob("camera*/*.jpg"))
    assert sorted(row["path"] for row in clusters) == [str(path) for path in images]
    for row in clusters:
        assert row["camera"] == Path(row["path"]).parent.name
        assert (row["confidence"] == "") == (row["cluster"] == "-1")
        assert row["cluster"] == "-1" or 0 <= float(row["confidence"]) <= 1
    matches = rows(output / "matches.csv")
    assert 0 < len(matches) <= 5
    of = {row["path"]: row["cluster"] for row in clusters}
    for row in matches:
        assert row["camera"] != row["other_camera"]
        same = of[row["path"]] == of[row["other_path"]] != "-1"
        assert row["cluster"] == (of[row["path"]] if same else "")
    # The labels.csv beside the crops is a test set, and the model knows its cameras.
    results = json.loads((output / "results.json").read_text())
    assert 0 < results["final"][0]["numbers"]["mAP"] <= 1
    for name in ("clusters.png", "matches.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 200
    log = (output / "log.txt").read_text()
    assert "Clusters of the final model" in log
    assert "takes its cameras for unknown" not in log


def test_images_that_cannot_be_read_are_skipped_to_the_end(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    broken = sorted((tmp_path / "datasets" / "shop").glob("camera*/*.jpg"))[3]
    broken.write_bytes(broken.read_bytes()[:100])
    pairs = ["DATALOADER.ON_ERROR", "skip", "DATASETS.TEST", "[]", "TEST.RANKED_LISTS", "4"]
    train(load_config(file, ["OUTPUT_DIR", str(output), *pairs]))
    of = {row["path"]: row["cluster"] for row in rows(output / "clusters.csv")}
    assert of[str(broken)] == "-1"
    assert set(of.values()) > {"-1"}
    matches = rows(output / "matches.csv")
    assert matches
    assert not any(str(broken) in row.values() for row in matches)
    assert (output / "model_final.safetensors").is_file()
    trained = load_trained(output)
    assert picture_clusters(tmp_path / "clusters.png", trained, rows=3, columns=3)
    picture_cluster_embedding(tmp_path / "embedding.png", trained, "tsne")


def test_without_clusters_at_the_end_matches_are_still_written(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(load_config(file, ["OUTPUT_DIR", str(output), "CLUSTERER", "ClustersOnce"]))
    log = (output / "log.txt").read_text()
    assert "WARNING: The final model: no cluster: raise eps" in log
    assert {row["cluster"] for row in rows(output / "clusters.csv")} == {"-1"}
    matches = rows(output / "matches.csv")
    assert matches
    assert {row["cluster"] for row in matches} == {""}
    assert (output / "matches.png").is_file()


def test_without_a_clusterer_there_is_nothing_to_write(file: Path, tmp_path: Path) -> None:
    pairs = ["OUTPUT_DIR", str(tmp_path / "run"), "CLUSTERER", "null"]
    pairs += ["DATASETS.TRAIN", "{NAME: CSV, PATH: shop/labels.csv, TRAIN_SPLIT: gallery}"]
    with pytest.raises(ConfigError, match="WriteClusters: expected a clusterer"):
        train(load_config(file, pairs))
