"""Whole runs of MGH: from the first labels through both kinds of correction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reid.modeling.weights import read_checkpoint

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "projects" / "MGH" / "configs" / "market.yaml"
BACKBONE = "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1}"
PAIRS = (
    "MODEL.BACKBONE", BACKBONE, "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2",
    "LABELLER.FROM_EPOCH", "1", "LABELLER.NEIGHBORS", "[3, 5]", "CRITERION.0.FROM_EPOCH", "1",
    "TEST.EVAL_PERIOD", "3",
)  # fmt: skip
PERSONS = (
    "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
    "HEIGHT: 48, WIDTH: 32}"
)


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    """Labels, the first correction, the later one; stopped between the first two."""
    whole = train_tiny(CONFIG, "whole", *PAIRS, "SOLVER.MAX_EPOCHS", "3")
    train = {line["epoch"]: line for line in lines_of(whole, "train")}
    assert train[0]["global_identity"] == train[0]["global_instance"] == 0 < train[0]["loss"]
    assert train[1]["global_identity"] > 0 < train[1]["global_instance"]
    assert ["corrected" in line for line in lines_of(whole, "labels")] == [False, True, True]
    stopped = train_tiny(CONFIG, "two", *PAIRS, "SOLVER.MAX_EPOCHS", "1")
    train_tiny(
        CONFIG, "two", *PAIRS, "SOLVER.MAX_EPOCHS", "3", resume=True, allow_config_change=True
    )
    one, _ = read_checkpoint(whole / "model_final.safetensors")
    other, _ = read_checkpoint(stopped / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_processes_train_as_one(
    train_in_processes: Callable[..., tuple[Path, Path]],
) -> None:
    pairs = [
        *PAIRS, "DATASETS.TRAIN", PERSONS, "INPUT.SIZE", "[48, 32]", "DATALOADER.NUM_WORKERS", "0",
        "DATALOADER.SAMPLER.BATCH_SIZE", "16", "MODEL.BACKBONE_WEIGHTS", "''", "CLUSTERER.K1", "6",
        "CLUSTERER.K2", "2", "CLUSTERER.EPS", "0.8", "CLUSTERER.MIN_SAMPLES", "2",
        "SOLVER.MAX_EPOCHS", "2", "DEVICE", "cpu", "LOG_PERIOD", "1", "SOLVER.BASE_LR", "5.0e-5",
        "TEST.EVAL_PERIOD", "0",
    ]  # fmt: skip
    folders = train_in_processes(CONFIG, *pairs)
    for kind in ("labels", "train"):
        one, other = (lines_of(folder, kind) for folder in folders)
        assert len(one) == len(other) > 0
        for line, twin in zip(one, other, strict=True):
            for key in line.keys() - {"data_time", "step_time", "memory_mb", "extraction_time",
                                      "label_time"}:  # fmt: skip
                expected = line[key]
                if not isinstance(expected, str):
                    expected = pytest.approx(expected, rel=1e-4, abs=1e-5)
                assert twin[key] == expected, (kind, key)
