"""BoT: the published settings, a small run, and odd data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from reid.config import Config, load_config
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.modeling.weights import read_checkpoint
from reid.registry import ConfigError
from reid.workflows.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "DATALOADER.NUM_WORKERS", "0", "DATALOADER.SAMPLER.BATCH_SIZE", "16",
    "INPUT.SIZE", "[64, 32]", "MODEL.BACKBONE.MODEL", "test_resnet", "MODEL.BACKBONE_WEIGHTS", "",
    "SOLVER.AMP", "off", "SOLVER.MAX_EPOCHS", "2", "SOLVER.MILESTONES", "[1]",
    "SOLVER.WARMUP_ITERATIONS", "3", "DEVICE", "cpu", "LOG_PERIOD", "1",
]  # fmt: skip
PERSONS = ("{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 4, NUM_CAMERAS: 3, "
           "NUM_DISTRACTORS: 2, HEIGHT: 32, WIDTH: 16}")  # fmt: skip


@pytest.mark.parametrize("network", ["", "_ibn"])
@pytest.mark.parametrize(("name", "images"), [("market", 12936), ("duke", 16522), ("msmt", 30248)])
def test_published_settings(name: str, images: int, network: str) -> None:
    config = load_config(CONFIGS / f"supervised_{name}{network}.yaml")
    solver = config.solver
    assert [solver.optimizer, solver.base_lr, solver.weight_decay, solver.max_epochs,
            solver.schedule, solver.gamma, solver.warmup_iterations, solver.warmup_factor,
            solver.bias_lr_factor, solver.amp] == [
        "Adam", 3.5e-4, 5e-4, 120, "multistep", 0.1, 2000, 0.1, 1, "fp16"]  # fmt: skip
    # fast-reid counts epochs from the one in which the warm-up ends
    late = 2000 // (images // 64)
    assert solver.milestones == [40 + late, 90 + late]
    assert config.dataloader.sampler == {"name": "RandomIdentitySampler", "batch_size": 64,
                                         "images_per_identity": 4, "epoch": "images"}  # fmt: skip
    assert config.model.head == {"name": "BNNeckHead", "neck_feature": "after"}
    norm = {"norm": "ibn"} if network else {}
    assert config.model.backbone == {"name": "TimmBackbone", "model": "resnet50", "pool": "avg",
                                     "last_stride": 1, **norm}  # fmt: skip
    assert config.model.bn_samples_per_group == 0
    assert config.criterion == [
        {"name": "CrossEntropy", "smoothing": 0.1, "smooth_true_class": False, "init_std": 0.01},
        {"name": "Triplet", "margin": 0.3},
    ]
    assert config.input.size == (256, 128)
    assert config.input.interpolation == config.input.test_interpolation == "bicubic"
    crop, flip, erasing = config.input.transforms
    assert (crop, flip) == ({"name": "PadCrop", "pad": 10}, {"name": "RandomFlip", "prob": 0.5})
    assert erasing == {"name": "RandomErasing", "prob": 0.5, "area": [0.02, 0.33],
                       "aspect": [0.3, 3.3], "fill": "mean"}  # fmt: skip


def test_settings_of_the_paper() -> None:
    config = load_config(CONFIGS / "supervised_market_paper.yaml")
    assert config.solver.milestones == [40, 70]
    assert (config.solver.warmup_epochs, config.solver.warmup_iterations) == (10, 0)
    assert config.criterion[0] == {"name": "CrossEntropy", "smoothing": 0.1, "init_std": 0.01}


def small(folder: Path, dataset: str, *pairs: str) -> Config:
    return load_config(
        CONFIGS / "supervised_market.yaml",
        [*SMALL, "DATASETS.TRAIN", dataset, "OUTPUT_DIR", str(folder / "run"), *pairs],
    )


def trained(folder: Path, dataset: str, *pairs: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.json; its weights are finite."""
    train(small(folder, dataset, *pairs))
    state, _ = read_checkpoint(folder / "run" / "model_final.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    return [json.loads(line) for line in (folder / "run" / "metrics.json").read_text().splitlines()]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    return tmp_path


def list_of(root: Path, images_of_identity: list[int], unlabelled: int = 0) -> str:
    """A CSV list of drawn persons, with the given number of images of each."""
    persons = SyntheticPersons(num_train=8, num_test=2, num_cameras=3, num_distractors=0, height=32,
                               width=16)  # fmt: skip
    by_identity: dict[int, list[tuple[str, int]]] = {}
    for record in persons.load("train"):
        path = str(Path(record.path).relative_to(root))
        by_identity.setdefault(record.pid, []).append((path, record.camid))
    rows = ["path,pid,camid"]
    for pid, (count, images) in enumerate(zip(images_of_identity, by_identity.values())):  # noqa: B905
        assert len(images) >= count
        rows += [f"{path},{pid},{camid}" for path, camid in images[:count]]
    rows += [f"{path},,{camid}" for path, camid in [*by_identity.values()][-1][:unlabelled]]
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    return "{NAME: CSV, PATH: list.csv}"


def test_a_small_run(tmp_path: Path) -> None:
    lines = trained(tmp_path, PERSONS)
    steps = [line for line in lines if line["kind"] == "train"]
    images = len(SyntheticPersons(num_train=8, num_test=4, num_cameras=3, num_distractors=2,
                                  height=32, width=16).load("train"))  # fmt: skip
    each = images // 16
    assert Counter(line["epoch"] for line in steps) == {0: each, 1: each}
    assert {"cross_entropy", "triplet"} <= steps[0].keys()
    rates = [line["lr"] for line in steps]
    warm = [0.1 + 0.3 * i for i in range(3)] + [1.0] * (2 * each)
    expected = [3.5e-4 * warm[i] * (1 if i < each else 0.1) for i in range(2 * each)]
    assert rates == pytest.approx(expected)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 < results["final"][0]["numbers"]["mAP"] <= 1


def test_one_image_an_identity(tmp_path: Path) -> None:
    dataset = list_of(tmp_path, [1] * 8)
    lines = trained(tmp_path, dataset, "SOLVER.MAX_EPOCHS", "1")
    assert [line["triplet"] for line in lines if line["kind"] == "train"]


def test_fewer_identities_than_a_batch_takes(tmp_path: Path) -> None:
    dataset = list_of(tmp_path, [3, 1], unlabelled=2)
    lines = trained(tmp_path, dataset, "SOLVER.MAX_EPOCHS", "1")
    (labels,) = (line for line in lines if line["kind"] == "labels")
    assert (labels["clusters"], labels["outliers"]) == (2, 2)


def test_one_identity_is_nothing_to_classify(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"criterion\[0\].*needs two identities or more, got 1"):
        train(small(tmp_path, list_of(tmp_path, [4])))
