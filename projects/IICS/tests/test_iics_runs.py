"""IICS: whole runs with a tiny network, resumed and in two processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from reid.engine.hooks.checkpoints import checkpoint_paths, epoch_of
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.weights import read_checkpoint
from reid.registry import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
ROOT = Path(__file__).parents[3]
TINY = (
    "MODEL.BACKBONE", "{NAME: AIBNResNet, MODEL: test_resnet, LAST_STRIDE: 1}",
    "MODEL.BN_SAMPLES_PER_GROUP", "16", "CLUSTERER", "null", "CHECKPOINT_KEEP", "0",
    "DATALOADER.SAMPLER.EPOCH", "round", "LABELLER.ROUNDS", "2", "LABELLER.CLUSTERS", "8",
    "STAGES.0.LABELLER.CLUSTERS", "6", "STAGES.0.LABELLER.SMALL_CAMERAS", "alone",
    "ROUNDS", "2", "SOLVER.MAX_EPOCHS", "8", "TEST.EVAL_PERIOD", "0", "LOG_PERIOD", "1",
)  # fmt: skip


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The numbers of metrics.json without times and memory."""
    left_out = ("kind", "data_time", "step_time", "memory_mb", "extraction_time", "label_time")
    read = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in left_out}
        for line in read
        if line["kind"] == kind
    ]


def test_a_run_resumes_anywhere(tmp_path: Path, train_tiny: Callable[..., Path]) -> None:
    pairs = [*TINY, "STAGES.0.EPOCHS", "1", "SOLVER.MAX_EPOCHS", "6"]
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    labels = lines(whole, "labels")
    assert [line["epoch"] for line in labels] == [0, 1, 3, 4]  # once in a stage
    assert [line["clusters"] for line in labels] == [18, 8, 18, 8]  # 3 cameras x 6, then 8
    assert [line.get("mix") for line in labels][1::2] == pytest.approx([0.02, 0.02 * 0.5**0.6])
    train = lines(whole, "train")
    assert {line["lr"] for line in train} == {0.005, 0.01}
    assert all("triplet" in line for line in train if line["epoch"] in (1, 2, 4, 5))
    first = next(line for line in train if line["epoch"] == 0)
    assert first["cross_entropy"] == pytest.approx(3 * torch.tensor(6.0).log().item(), rel=0.1)
    expected, _ = read_checkpoint(whole / "model_final.safetensors")
    assert all(name.startswith("backbone.") for name in expected)  # heads are not the model's
    for epoch in (2, 4):  # within a stage, and between two
        part = tmp_path / f"from{epoch}"
        shutil.copytree(whole, part)
        for path in checkpoint_paths(part):
            if epoch_of(path) > epoch:
                path.unlink()
        (part / "model_final.safetensors").unlink()
        train_tiny(CONFIGS / "market.yaml", part.name, *pairs, resume=True)
        found, _ = read_checkpoint(part / "model_final.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items()), epoch
        assert lines(part, "labels") == labels


def test_clusters_by_a_threshold_train_and_groups_change_with_the_stage(
    train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = []

    def regroup(model: nn.Module, size: int, running: Literal["first", "all"]) -> None:
        groups.append((size, running))
        group_batch_norms(model, size, running)

    monkeypatch.setattr("reid.assembly.stages.group_batch_norms", regroup)
    pairs = [*TINY, "ROUNDS", "1", "SOLVER.MAX_EPOCHS", "4"]
    shares = ("LABELLER", "{NAME: InterCamera, SHARE: 0.01}", "CRITERION.0.EXACT_CLASSES", "true",
              "STAGES.0.LABELLER", "{NAME: IntraCamera, SHARE: 0.02}",
              "STAGES.0.CRITERION.0.EXACT_CLASSES", "true")  # fmt: skip
    kept = [item for pair in zip(pairs[::2], pairs[1::2], strict=True)
            if "LABELLER" not in pair[0] for item in pair]  # fmt: skip
    folder = train_tiny(CONFIGS / "market.yaml", "share", *kept, *shares)
    labels = lines(folder, "labels")
    assert [line["clusters"] > 1 for line in labels] == [True, True]
    assert labels[1]["limit"] > 0
    assert groups == [(8, "all"), (16, "all")]
    assert (folder / "model_final.safetensors").is_file()


def test_labels_of_the_second_stage_are_made_once(train_tiny: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="give this stage LABELS: once"):
        train_tiny(CONFIGS / "market.yaml", "each", *TINY, "STAGES.1.LABELS", "epoch")


@pytest.mark.slow
def test_two_processes_train_as_one(
    train_in_processes: Callable[..., tuple[Path, Path]],
) -> None:
    """In stage 1, the second camera's 8 images are on both processes."""
    persons = (
        "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, HEIGHT: 48, "
        "WIDTH: 32}"
    )
    pairs = [
        *TINY, "DATASETS.TRAIN", persons, "INPUT.SIZE", "[48, 32]", "DATALOADER.NUM_WORKERS", "0",
        "DATALOADER.SAMPLER.BATCH_SIZE", "16", "MODEL.BACKBONE_WEIGHTS", "''", "DEVICE", "cpu",
        "ROUNDS", "1", "SOLVER.MAX_EPOCHS", "2", "STAGES.0.EPOCHS", "1", "STAGES.1.EPOCHS", "1",
        # rounding grows fast with larger rates
        "SOLVER.BASE_LR", "1e-4", "STAGES.0.SOLVER.BASE_LR", "1e-4",
    ]  # fmt: skip
    folders = train_in_processes(CONFIGS / "market.yaml", *pairs)
    for kind in ("labels", "train"):
        one, two = (lines(folder, kind) for folder in folders)
        assert len(one) == len(two) > 1
        for line, other in zip(one, two, strict=True):
            assert other == pytest.approx(line, rel=1e-4, abs=1e-5)
    before, after = (read_checkpoint(folder / "model_final.safetensors")[0] for folder in folders)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5, msg=name)
