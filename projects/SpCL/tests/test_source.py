"""SpCL with a labelled source: settings, whole runs, data on which the published code fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid.config import load_config
from reid.data.datasets.base import Split
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.engine.hooks.checkpoints import checkpoint_paths, epoch_of
from reid.modeling.weights import read_checkpoint
from reid.registry import DATASET
from reid.structures import ImageRecord
from reid.workflows.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
PERSONS = (
    "NUM_TRAIN: 8, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 0, IMAGES_PER_CAMERA: 2, "
    "HEIGHT: 48, WIDTH: 32"
)
TINY = {
    "DATASETS.SOURCE": f"{{NAME: RenamedPersons, SEED: 7, {PERSONS}}}",
    "DATASETS.TRAIN": f"{{NAME: RenamedPersons, {PERSONS}}}",
    "INPUT.SIZE": "[48, 32]", "DATALOADER.NUM_WORKERS": "0", "MODEL.BACKBONE_WEIGHTS": "''",
    "DATALOADER.SAMPLER.SOURCE.BATCH_SIZE": "8", "DATALOADER.SAMPLER.TARGET.BATCH_SIZE": "16",
    "DATALOADER.SAMPLER.TARGET.STEPS_PER_EPOCH": "2", "MODEL.BN_SAMPLES_PER_GROUP": "4",
    "MODEL.BACKBONE": "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1}",
    "CLUSTERER.K1": "6", "CLUSTERER.K2": "2", "CLUSTERER.EPS": "0.8", "CLUSTERER.EPS_GAP": "0.1",
    "CLUSTERER.MIN_SAMPLES": "2", "SOLVER.MAX_EPOCHS": "2", "DEVICE": "cpu",
    "CHECKPOINT_KEEP": "0", "TEST.SOURCE": "true", "LOG_PERIOD": "1",
}  # fmt: skip


class RenamedPersons(SyntheticPersons):
    """Drawn persons; the source's identities may have gaps, the target's may be wrong."""

    changed = False

    def __init__(
        self, seed: int = 0, num_train: int = 8, num_test: int = 4, num_cameras: int = 3,
        images_per_camera: int = 2, num_distractors: int = 0, height: int = 48, width: int = 32,
    ) -> None:  # fmt: skip
        super().__init__(seed, num_train, num_test, num_cameras, images_per_camera,
                         num_distractors, height, width)  # fmt: skip
        self.is_source = seed > 0

    def load(self, split: Split) -> list[ImageRecord]:
        records = super().load(split)
        if not self.changed or split != "train":
            return records
        return [
            replace(record, pid=5 + 3 * record.pid if self.is_source else number % 3)
            for number, record in enumerate(records)
        ]


@pytest.fixture(autouse=True)
def persons(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path_factory.getbasetemp() / "drawn_once"))
    before = dict(DATASET._obj_map)
    DATASET.register(RenamedPersons)
    yield
    DATASET._obj_map = before


def run(folder: Path, *pairs: str, **options: bool) -> Path:
    small = [text for pair in TINY.items() for text in pair]
    file = CONFIGS / "uda_msmt_to_market.yaml"
    train(load_config(file, ["OUTPUT_DIR", str(folder), *small, *pairs]), **options)
    return folder


def weights(folder: Path, name: str = "model_final") -> Mapping[str, Tensor]:
    return read_checkpoint(folder / f"{name}.safetensors")[0]


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.json").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def test_a_run_its_resumption_and_identities_that_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")  # both domains have files of the same names
    target, source = weights(whole), weights(whole, "model_final_source_half")
    assert target.keys() == source.keys()
    assert not any(".target." in name or ".source." in name for name in target)
    halves = [name for name in target if not torch.equal(target[name], source[name])]
    assert "head.neck.running_mean" in halves
    for state in (target, source):
        assert bool(state["head.neck.bias"].any())  # trained in this mode
    results = json.loads((whole / "results.json").read_text())
    assert [entry["test_set"] for entry in results["final"]] == [
        "SyntheticPersons", "SyntheticPersons (2)",
    ]  # fmt: skip
    labels = lines(whole, "labels")
    assert labels[0]["outliers"] == 0  # each target image has a label
    assert labels[1]["extraction_time"] < labels[0]["extraction_time"]  # extracted once

    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for path in checkpoint_paths(part):
        if epoch_of(path) > 1:
            path.unlink()
    (part / "model_final.safetensors").unlink()
    run(part, resume=True)
    monkeypatch.setattr(RenamedPersons, "changed", True)
    wrong = run(tmp_path / "wrong")
    for name, value in target.items():
        assert torch.equal(weights(part)[name], value), name
        assert torch.equal(weights(wrong)[name], value), name


def test_the_order_of_updates_is_an_option(tmp_path: Path) -> None:
    losses = []
    for order in ("published", "exact"):
        pairs = ("CRITERION.0.SOURCE_GRADIENT", order, "SOLVER.MAX_EPOCHS", "1")
        folder = run(tmp_path / order, *pairs)
        losses.append([line["loss"] for line in lines(folder, "train")])
    assert losses[0][0] == losses[1][0]  # only the gradient differs
    assert losses[0][1] != losses[1][1]


@pytest.mark.parametrize(
    ("name", "source", "target", "steps"),
    [
        ("msmt_to_market", "MSMT17", "Market1501", 400),
        ("msmt_to_market_ibn", "MSMT17", "Market1501", 400),
        ("to_market", "DukeMTMCreID", "Market1501", 400),
        ("to_duke", "Market1501", "DukeMTMCreID", 400),
        ("to_msmt", "Market1501", "MSMT17", 800),
        ("to_msmt_ibn", "Market1501", "MSMT17", 800),
    ],
)
def test_published_hyper_parameters(name: str, source: str, target: str, steps: int) -> None:
    config = load_config(CONFIGS / f"uda_{name}.yaml")
    half = {"name": "MultiGallerySampler", "batch_size": 64, "images_per_identity": 4}
    assert config.dataloader.sampler == {
        "name": "TwoDomainSampler", "source": half, "target": {**half, "steps_per_epoch": steps},
    }  # fmt: skip
    assert config.criterion == [
        {"name": "SpCLLoss", "temperature": 0.05, "momentum": 0.2, "source_gradient": "published"}
    ]
    assert config.model.domain_bn
    assert config.model.bn_samples_per_group == 16
    assert config.datasets.source["name"] == source
    assert config.datasets.train["name"] == target
    assert (config.model.backbone.get("norm") == "ibn") == name.endswith("_ibn")
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.max_epochs) == ("Adam", 3.5e-4, 50)
    assert config.clusterer is not None
    assert (config.clusterer["eps"], config.clusterer["k1"]) == (0.6, 30)
