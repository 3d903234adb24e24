"""A labelled source and an unlabelled target in one run."""

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
from reid.registry import DATASET, ConfigError
from reid.structures import ImageRecord
from reid.workflows.evaluate import evaluate
from reid.workflows.train import train

PERSONS = (
    "NUM_TRAIN: 8, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 0, IMAGES_PER_CAMERA: 2, "
    "HEIGHT: 48, WIDTH: 32"
)
CONFIG = f"""
PLUGINS: [clustercontrast]
DATASETS:
  SOURCE: {{NAME: SyntheticPersons, SEED: 7, WEATHER: fog, {PERSONS}}}
  TRAIN: {{NAME: PersonsWithIdentities, {PERSONS}}}
INPUT: {{SIZE: [48, 32], TRANSFORMS: [RandomFlip]}}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {{NAME: PKSampler, BATCH_SIZE: 8, IMAGES_PER_IDENTITY: 4, STEPS_PER_EPOCH: 2}}
MODEL: {{BACKBONE: {{NAME: TimmBackbone, MODEL: test_resnet}}}}
CLUSTERER: {{NAME: KMeans, NUM_CLUSTERS: 5}}
CRITERION: [{{NAME: Triplet, MARGIN: 0.3}}]
STAGES:
  - NAME: source
    EPOCHS: 1
    DATASETS: {{DOMAINS: source}}
    CRITERION: [{{NAME: CrossEntropy}}, {{NAME: Triplet, MARGIN: 0.3}}]
  - NAME: target
    EPOCHS: 1
    DATASETS: {{DOMAINS: target}}
  - NAME: both
    EPOCHS: 2
    CRITERION: [{{NAME: ClusterContrastLoss}}]
    DATALOADER:
      SAMPLER:
        NAME: TwoDomainSampler
        SOURCE: {{NAME: PKSampler, BATCH_SIZE: 8, IMAGES_PER_IDENTITY: 4}}
        TARGET: {{NAME: PKSampler, BATCH_SIZE: 8, IMAGES_PER_IDENTITY: 4, STEPS_PER_EPOCH: 2}}
SOLVER: {{BASE_LR: 0.01, WARMUP_EPOCHS: 0, OPTIMIZER: SGD}}
TEST: {{EVAL_PERIOD: 0, SOURCE: true}}
CHECKPOINT_KEEP: 0
LOG_PERIOD: 1
DEVICE: cpu
"""


class PersonsWithIdentities(SyntheticPersons):
    """Drawn persons whose training identities may be wrong."""

    wrong = False

    def load(self, split: Split) -> list[ImageRecord]:
        records = super().load(split)
        if not (self.wrong and split == "train"):
            return records
        return [replace(record, pid=number % 3) for number, record in enumerate(records)]


@pytest.fixture(autouse=True)
def persons(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path_factory.getbasetemp() / "drawn_once"))
    before = dict(DATASET._obj_map)
    DATASET.register(PersonsWithIdentities)
    yield
    DATASET._obj_map = before


def run(folder: Path, *pairs: str, config: str = CONFIG, **options: bool) -> Path:
    file = folder.parent / "domains.yaml"
    file.write_text(config)
    train(load_config(file, ["OUTPUT_DIR", str(folder), *pairs]), **options)
    return folder


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.json").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def weights(folder: Path, name: str = "model_final") -> Mapping[str, Tensor]:
    return read_checkpoint(folder / f"{name}.safetensors")[0]


def test_source_then_target_then_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    results = json.loads((whole / "results.json").read_text())
    names = ["SyntheticPersons", "SyntheticPersons (2)"]  # the target first: it chooses the best
    for key, epoch in (("direct_transfer", 1), ("final", 4)):
        entries = [(entry["test_set"], entry["epoch"]) for entry in results[key]]
        assert entries == [(name, epoch) for name in names], key
    log = (whole / "log.txt").read_text()
    assert "Direct transfer: the model of the source" in log
    assert "after epoch 1, direct transfer" in log
    source, final = weights(whole, "model_source"), weights(whole)
    assert source.keys() == final.keys()
    assert any(not torch.equal(source[name], final[name]) for name in final)
    labels = lines(whole, "labels")
    clusters = [line["clusters"] for line in labels]
    assert clusters == [8, 5, 5, 5]  # identities of the source, then clusters of the target
    assert "purity" in labels[1]

    # The target's identities reach nothing that is trained.
    monkeypatch.setattr(PersonsWithIdentities, "wrong", True)
    wrong = run(tmp_path / "wrong")
    assert lines(wrong, "labels")[1]["purity"] != labels[1]["purity"]
    for name, value in final.items():
        assert torch.equal(weights(wrong)[name], value), name
    monkeypatch.setattr(PersonsWithIdentities, "wrong", False)

    for epoch in (1, 3):  # between two stages, and within one
        part = tmp_path / f"from{epoch}"
        shutil.copytree(whole, part)
        for path in checkpoint_paths(part):
            if epoch_of(path) > epoch:
                path.unlink()
        (part / "model_final.safetensors").unlink()
        run(part, resume=True)
        for name, value in final.items():
            assert torch.equal(weights(part)[name], value), (epoch, name)
        again = json.loads((part / "results.json").read_text())
        assert again["direct_transfer"] == results["direct_transfer"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("STAGES", "[{EPOCHS: 1, CLUSTERER: null}]"), "identities of the target are never"),
        (("DATASETS.SOURCE", "null", "TEST.SOURCE", "false"),
         r"datasets.domains: expected all, since datasets.source"),
        (("DATASETS.SOURCE", "null", "STAGES", "[]"), r"test.source: expected false"),
        (("STAGES", "[{EPOCHS: 1}]", "MODEL.DOMAIN_BN", "true"),
         "domain_bn needs batches of source and target images, as TwoDomainSampler"),
        (("STAGES", "[{EPOCHS: 1}]", "LABELLER", "{NAME: PerDomain}", "CLUSTERER", "null"),
         "labeller.target: PerDomain needs this option"),
        (("STAGES", "[]", "DATASETS.SOURCE", f"{{NAME: PersonsWithIdentities, {PERSONS}}}"),
         "in datasets.train too"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(tmp_path: Path, pairs: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", *pairs)


def test_a_source_without_identities_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SyntheticPersons.load

    def unlabelled(self: SyntheticPersons, split: Split) -> list[ImageRecord]:
        return [replace(record, pid=-1) for record in load(self, split)]

    monkeypatch.setattr(SyntheticPersons, "load", unlabelled)
    with pytest.raises(ConfigError, match="no training image of SyntheticPersons has an identity"):
        run(tmp_path / "run")


def test_a_trained_model_is_evaluated_on_the_target(tmp_path: Path) -> None:
    stages = "[{EPOCHS: 1, DATASETS: {DOMAINS: source}, CRITERION: [CrossEntropy]}]"
    folder = run(tmp_path / "run", "STAGES", stages)
    final = json.loads((folder / "results.json").read_text())["final"]
    assert not (folder / "model_source.safetensors").exists()  # it is the final one
    config = load_config(folder / "config.yaml", ["MODEL.WEIGHTS",
                         str(folder / "model_final.safetensors")])  # fmt: skip
    scores = evaluate(config)
    assert scores == {entry["test_set"]: pytest.approx(entry["numbers"]) for entry in final}
    assert len(scores) == 2
