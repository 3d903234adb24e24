"""PPLR: whole runs with a tiny network, resumed, and with two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid.modeling.weights import load_checkpoint, read_checkpoint

ROOT = Path(__file__).parents[3]
CONFIGS = Path(__file__).parents[1] / "configs"
SAMPLER = "{NAME: CrossCameraSampler, BATCH_SIZE: 16, IMAGES_PER_IDENTITY: 4, STEPS_PER_EPOCH: 2}"
PAIRS = (
    # the map of 48 x 32 pixels has 3 rows with the last stride of 1
    "MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1}",
    "MODEL.BN_SAMPLES_PER_GROUP", "8", "DATALOADER.SAMPLER", SAMPLER,
    "CRITERION.0.NEIGHBORS", "5", "CRITERION.0.AGREEMENT_FROM_EPOCH", "1",
)  # fmt: skip


def train_lines(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *PAIRS)
    for line in train_lines(whole):
        names = {"global_refined", "part_smoothed", "triplet", "global_camera", "part_camera"}
        assert names <= line.keys()
        assert all(line[name] > 0 for name in names)
    stopped = train_tiny(CONFIGS / "market.yaml", "two", *PAIRS, "SOLVER.MAX_EPOCHS", "1")
    saved = load_checkpoint(stopped / "checkpoint_0001.pth")
    rows = saved["criterion"]["losses.0.classifiers.0.weight"]
    assert len(rows) > 1
    assert sum(m["exp_avg"].shape == rows.shape for m in saved["optimizer"]["state"].values()) >= 3
    train_tiny(CONFIGS / "market.yaml", "two", *PAIRS, resume=True, allow_config_change=True)
    one, other = (load_checkpoint(folder / "checkpoint_0002.pth") for folder in (whole, stopped))
    for entry in ("model", "criterion"):
        assert one[entry].keys() == other[entry].keys()
        assert all(torch.equal(other[entry][name], value) for name, value in one[entry].items())
    for number, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(other["optimizer"]["state"][number][name], value), (number, name)


def test_the_camera_blind_variant_with_dropped_moments(train_tiny: Callable[..., Path]) -> None:
    folder = train_tiny(
        CONFIGS / "market_blind.yaml", "blind", *PAIRS, "CRITERION.0.MOMENTS", "drop",
        "CLUSTERER.NAME", "JaccardDBSCAN",
    )  # fmt: skip
    assert all(line.keys().isdisjoint({"global_camera"}) for line in train_lines(folder))
    saved = load_checkpoint(folder / "checkpoint_0002.pth")
    steps = {float(moments["step"]) for moments in saved["optimizer"]["state"].values()}
    assert steps == {2.0, 4.0}, "classifiers start anew in each epoch of two steps"


@pytest.mark.slow
def test_two_processes_train_as_one(
    train_in_processes: Callable[..., tuple[Path, Path]],
) -> None:
    persons = "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, HEIGHT: 48, WIDTH: 24}"
    one, two = train_in_processes(
        CONFIGS / "synthetic.yaml", "DATASETS.TRAIN", persons, "DEVICE", "cpu",
        "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "DATALOADER.SAMPLER.BATCH_SIZE", "16",
        "MODEL.BN_SAMPLES_PER_GROUP", "8", "CLUSTERER.K1", "6", "CLUSTERER.K2", "2",
        "CLUSTERER.EPS", "0.8", "CLUSTERER.MIN_SAMPLES", "2",
        # Each process draws its own drop path, and Adam turns rounding into whole steps.
        "MODEL.BACKBONE.DROP_PATH", "0.0", "SOLVER.OPTIMIZER", "SGD",
        "SOLVER.BASE_LR", "1.0e-5", "SOLVER.MAX_EPOCHS", "2", "SOLVER.WARMUP_EPOCHS", "0",
    )  # fmt: skip
    for line, other in zip(train_lines(one), train_lines(two), strict=True):
        for name in ("global_refined", "part_smoothed", "triplet", "global_camera", "part_camera"):
            assert other[name] == pytest.approx(line[name], rel=1e-4), (name, line["epoch"])
    before, _ = read_checkpoint(one / "model_final.safetensors")
    after, _ = read_checkpoint(two / "model_final.safetensors")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4, msg=name)
