"""SSG: whole runs with a tiny network, from a source to a target; configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reid.assembly.plugins import register_parts
from reid.assembly.specs import check_specs
from reid.config import load_config
from reid.data.datasets.base import Split
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.engine.hooks.checkpoints import checkpoint_paths
from reid.modeling.weights import load_checkpoint, read_checkpoint
from reid.registry import ConfigError
from reid.structures import ImageRecord

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "projects" / "SSG" / "configs"
PERSONS = (
    "{{NAME: SyntheticPersons, SEED: {}, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, "
    "HEIGHT: 48, WIDTH: 32}}"
)
CLUSTERER = (
    "{NAME: BankClusterer, NAMES: [upper, lower], CLUSTERER: {NAME: RerankedDBSCAN, K1: 6, K2: 2, "
    "RHO: 0.1, SOURCE_WEIGHT: 0.1, MIN_SAMPLES: 2}}"
)
TINY = (
    "DATASETS.TRAIN", PERSONS.format(0), "DATASETS.SOURCE", PERSONS.format(1),
    "INPUT.SIZE", "[48, 32]", "DATALOADER.NUM_WORKERS", "0", "DEVICE", "cpu",
    "MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet}", "MODEL.BACKBONE_WEIGHTS", "''",
    "DATALOADER.SAMPLER.BATCH_SIZE", "16", "DATALOADER.SAMPLER.PASSES", "2",
    "CLUSTERER", CLUSTERER,
    "STAGES.0.EPOCHS", "1", "STAGES.0.SOLVER.MILESTONES", "[1]", "STAGES.1.EPOCHS", "2",
    "STAGES.0.DATALOADER.SAMPLER",
    "{NAME: PKSampler, BATCH_SIZE: 16, IMAGES_PER_IDENTITY: 8, STEPS_PER_EPOCH: 2}",
    "SOLVER.MAX_EPOCHS", "3", "TEST.EVAL_PERIOD", "0", "CHECKPOINT_KEEP", "0",
)  # fmt: skip
LOSSES = ("embedding", "whole", "upper", "lower")


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.fixture
def adapt(train_tiny: Callable[..., Path]) -> Callable[..., Path]:
    def run(output: str, **options: bool) -> Path:
        return train_tiny(CONFIGS / "market.yaml", output, *TINY, **options)

    return run


def scramble_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the target's training images other identities."""
    load = SyntheticPersons.load

    def scrambled(self: SyntheticPersons, split: Split) -> list[ImageRecord]:
        records = load(self, split)
        if split != "train" or "seed0" not in self.site:
            return records
        return [replace(record, pid=i % 7) for i, record in enumerate(records)]

    monkeypatch.setattr(SyntheticPersons, "load", scrambled)


def test_from_source_to_target_and_resumed(adapt: Callable[..., Path]) -> None:
    folder = adapt("whole")
    expected, _ = read_checkpoint(folder / "model_final.safetensors")
    source, *rounds = lines_of(folder, "labels")
    assert "whole_eps" not in source
    assert len(rounds) == 2
    for bank in ("whole", "upper", "lower"):
        eps = [line[f"{bank}_eps"] for line in rounds]
        assert eps[0] == eps[1] > 0, "eps of the first round stays"
    for line in lines_of(folder, "train"):
        assert {"cross_entropy", "triplet"} <= line.keys() or set(LOSSES) <= line.keys()
    assert any(line.get("embedding", 0) > 0 for line in lines_of(folder, "train"))

    with pytest.MonkeyPatch.context() as patch:
        scramble_target(patch)
        other, _ = read_checkpoint(adapt("scrambled") / "model_final.safetensors")
    assert all(torch.equal(other[name], value) for name, value in expected.items())

    newest, *_ = checkpoint_paths(folder)
    before = load_checkpoint(newest)["optimizer"]["state"]
    newest.unlink()
    (folder / "model_final.safetensors").unlink()
    adapt("whole", resume=True)
    resumed, _ = read_checkpoint(folder / "model_final.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    after = load_checkpoint(newest)["optimizer"]["state"]
    for number, moments in before.items():
        for name, value in moments.items():
            assert torch.equal(after[number][name], value), (number, name)


@pytest.mark.slow
def test_two_processes_train_as_one(
    train_in_processes: Callable[..., tuple[Path, Path]],
) -> None:
    # rounding grows fast with larger rates
    slow = ("STAGES.0.SOLVER.BASE_LR", "1e-5")
    folders = train_in_processes(CONFIGS / "market.yaml", *TINY, *slow)
    one, two = (lines_of(folder, "train") for folder in folders)
    assert len(one) == len(two) > 1
    for line, other in zip(one, two, strict=True):
        for name in set(LOSSES) & line.keys():
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-5), name
    before, after = (read_checkpoint(folder / "model_final.safetensors")[0] for folder in folders)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "name", ["market", "duke", "msmt", "variants/msmt_from_market", "synthetic"]
)
def test_configs(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    register_parts(config)
    for spec in (config.datasets.train, config.datasets.source):
        assert isinstance(spec, dict)
        if spec["name"] == "DukeMTMCreID":
            spec["accept_withdrawn"] = True
    check_specs(config, training=True)
    source, target = (config.of_stage(number) for number in (0, 1))
    assert (source.datasets.domains, target.datasets.domains) == ("source", "target")
    assert source.clusterer is None
    assert target.criterion == [{"name": "SSGLoss", "margin": 0.5, "images_per_identity": 4}]
    assert target.clusterer is not None
    assert target.clusterer["clusterer"]["source_weight"] == 0.1
    if name == "synthetic":
        return
    assert config.solver.max_epochs == 180
    assert (source.solver.optimizer, source.solver.base_lr) == ("Adam", 3e-4)
    assert (target.solver.optimizer, target.solver.base_lr) == ("SGD", 6e-5)
    assert target.dataloader.sampler["passes"] == 70
    assert target.clusterer["clusterer"] == {
        "name": "RerankedDBSCAN", "k1": 20, "k2": 6, "eps": "rho", "rho": 1.6e-3,
        "source_weight": 0.1, "min_samples": 4,
    }  # fmt: skip


def test_a_source_is_needed(train_tiny: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"datasets\.source"):
        train_tiny(CONFIGS / "market.yaml", "none", *TINY, "DATASETS.SOURCE", "null")
