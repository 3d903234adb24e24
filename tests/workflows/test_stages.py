"""Runs of several stages: what is new in each, what goes on, and resuming anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.config import Config, load_config
from reid.engine.hooks.checkpoints import checkpoint_paths, epoch_of
from reid.labelling import Labeller
from reid.modeling.losses import Loss
from reid.modeling.weights import read_checkpoint
from reid.registry import LABELLER, LOSS, ConfigError
from reid.structures import (
    Batch,
    Embeddings,
    FeatureSet,
    ImageRecord,
    ProgressBar,
    PseudoLabels,
)

TrainTiny = Callable[..., Path]
CONFIG = """
DATALOADER: {SAMPLER: {NAME: PKSampler, BATCH_SIZE: 16, IMAGES_PER_IDENTITY: 4, STEPS_PER_EPOCH: 2}}
INPUT: {TRANSFORMS: [RandomFlip]}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CLUSTERER: {NAME: JaccardDBSCAN}
SOLVER: {BASE_LR: 0.01, WARMUP_EPOCHS: 0, MILESTONES: [1], OPTIMIZER: SGD}
TEST: {EVAL_PERIOD: 2}
CHECKPOINT_KEEP: 0
LOG_PERIOD: 1
"""
STAGES = """
STAGES:
  - {NAME: count, EPOCHS: 2, LABELS: once, LABELLER: Counting, CLUSTERER: null,
     CRITERION: [FromZero]}
  - {NAME: one more, EPOCHS: 1, REPEAT: 2, LABELLER: Counting, CLUSTERER: null,
     CRITERION: [FromZero], SOLVER: {OPTIMIZER: Adam, BASE_LR: 0.001}}
  - {NAME: clusters, EPOCHS: 2, CRITERION: [{NAME: Triplet, MARGIN: 0.3}, {NAME: Prototypes}],
     DATALOADER: {SAMPLER: {IMAGES_PER_IDENTITY: 2}}}
ROUNDS: 2
"""


class Counting(Labeller):
    """Groups of images by number, whose size grows by one each time; knows stages that began."""

    begun: list[tuple[int, str]]

    def __init__(self) -> None:
        self._calls = 0
        type(self).begun = []

    def begin_stage(self, round_number: int, ended: nn.Module | None) -> None:
        losses = "" if ended is None else "+".join(type(x).__name__ for x in ended.losses)  # type: ignore[union-attr]
        self.begun.append((round_number, losses))

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        self._calls += 1
        return PseudoLabels.from_clusters(torch.arange(len(records)) // (3 + self._calls))

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self._calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._calls = state["calls"]


class FromZero(Loss):
    """Cross entropy against a memory that is 0 when its labels come, as BUC's."""

    rows: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self._dim = embed_dim
        self.register_buffer("rows", torch.zeros(0, 0), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        super().set_labels(labels, features)
        self.rows = torch.zeros(labels.num_clusters, self._dim)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        logits = 10 * embeddings.unit[:, 0] @ self.rows.T
        return {"from_zero": F.cross_entropy(logits, self.cluster[batch.index])}

    def commit(self, embeddings: Embeddings, batch: Batch, taken: Tensor | None = None) -> None:  # type: ignore[override]
        self.rows[self.cluster[batch.index]] = embeddings.unit[:, 0]


class Prototypes(Loss):
    """Has a parameter, which the optimizer of its stage must train."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, embed_dim))

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        return {"prototypes": (embeddings.unit[:, 0] @ self.weight.T).square().mean()}


@pytest.fixture(autouse=True)
def parts() -> Iterator[None]:
    before = dict(LABELLER._obj_map), dict(LOSS._obj_map)
    LABELLER.register(Counting)
    LOSS.register(FromZero)
    LOSS.register(Prototypes)
    yield
    LABELLER._obj_map, LOSS._obj_map = before


def written(folder: Path, text: str) -> Path:
    path = folder / "stages.yaml"
    path.write_text(text)
    return path


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    changing = ("data_time", "step_time", "memory_mb", "extraction_time", "label_time")
    text = (folder / "metrics.json").read_text().splitlines()
    read = [{k: v for k, v in json.loads(line).items() if k not in changing} for line in text]
    return [line for line in read if line["kind"] == kind]


def weights(folder: Path) -> Mapping[str, Tensor]:
    return read_checkpoint(folder / "model_final.safetensors")[0]


def cut(source: Path, target: Path, epoch: int) -> None:
    """A copy of a run as it was when a signal had ended it after an epoch."""
    shutil.copytree(source, target)
    for path in checkpoint_paths(target):
        if epoch_of(path) > epoch:
            path.unlink()
    (target / "model_final.safetensors").unlink()


def test_each_stage_has_its_own_parts_and_a_resume_goes_on_in_any(
    tmp_path: Path, train_tiny: TrainTiny
) -> None:
    file = written(tmp_path, CONFIG + STAGES)
    epochs = ("SOLVER.MAX_EPOCHS", "12")  # which the fixture sets otherwise
    whole = train_tiny(file, "whole", *epochs)
    log = (whole / "log.txt").read_text().splitlines()
    titles = [line[line.index("Stage ") :] for line in log if "  Stage " in line]
    assert titles == [
        "Stage 1 of 8 (count): epochs 1 to 2", "Stage 2 of 8 (one more): epoch 3",
        "Stage 3 of 8 (one more): epoch 4", "Stage 4 of 8 (clusters): epochs 5 to 6",
        "Stage 5 of 8 (count): epochs 7 to 8", "Stage 6 of 8 (one more): epoch 9",
        "Stage 7 of 8 (one more): epoch 10", "Stage 8 of 8 (clusters): epochs 11 to 12",
    ]  # fmt: skip
    rates = {line["epoch"]: line["lr"] for line in lines(whole, "train")}
    one_round = [0.01, 0.001, 0.001, 0.001, 0.01, 0.001]
    assert [rates[epoch] for epoch in range(12)] == pytest.approx(one_round * 2)
    clusters = {line["epoch"]: line["clusters"] for line in lines(whole, "labels")}
    assert set(clusters) == {0, 2, 3, 4, 5, 6, 8, 9, 10, 11}  # once in two epochs, or each time
    counted = [clusters[epoch] for epoch in (0, 2, 3, 6, 8, 9)]
    assert counted == sorted(counted, reverse=True)  # its state goes from stage to stage
    losses = [set(line) & {"from_zero", "triplet", "prototypes"} for line in lines(whole, "train")]
    assert losses == ([{"from_zero"}] * 8 + [{"triplet", "prototypes"}] * 4) * 2
    first = [line["from_zero"] for line in lines(whole, "train") if line["epoch"] in (2, 3)][::2]
    assert first == pytest.approx([float(torch.tensor(clusters[e]).log()) for e in (2, 3)])
    assert Counting.begun == [
        (0, ""), (0, "FromZero"), (0, "FromZero"),
        (1, "Triplet+Prototypes"), (1, "FromZero"), (1, "FromZero"),
    ]  # fmt: skip
    assert [line["epoch"] for line in lines(whole, "test")] == [2, 4, 6, 8, 10, 12]
    for epoch in (3, 7, 11):  # between two stages, and within one of each kind
        part = tmp_path / f"from{epoch}"
        cut(whole, part, epoch)
        train_tiny(file, part.name, *epochs, resume=True)
        for kind in ("train", "labels", "test"):
            assert lines(part, kind) == lines(whole, kind), (epoch, kind)
        for name, value in weights(whole).items():
            assert torch.equal(weights(part)[name], value), (epoch, name)


def test_a_run_without_stages_is_one_stage(tmp_path: Path, train_tiny: TrainTiny) -> None:
    file = written(tmp_path, CONFIG + "CRITERION: [{NAME: Triplet, MARGIN: 0.3}]")
    plain = train_tiny(file, "plain", "SOLVER.MAX_EPOCHS", "2")
    staged = train_tiny(file, "staged", "SOLVER.MAX_EPOCHS", "2", "STAGES", "[{EPOCHS: 2}]")
    for kind in ("train", "labels", "test"):
        assert lines(plain, kind) == lines(staged, kind)
    for name, value in weights(plain).items():
        assert torch.equal(weights(staged)[name], value), name
    assert "stage" not in torch.load(checkpoint_paths(plain)[0], weights_only=True)


def test_labels_that_are_kept_keep_memories_too(tmp_path: Path, train_tiny: TrainTiny) -> None:
    kept = "STAGES: [{EPOCHS: 2, LABELS: once}]\nLABELLER: Counting\nCRITERION: [FromZero]"
    file = written(tmp_path, CONFIG.replace("CLUSTERER: {NAME: JaccardDBSCAN}", "") + kept)
    pairs = ("CLUSTERER", "null")
    losses = [line["from_zero"] for line in lines(train_tiny(file, "kept", *pairs), "train")]
    new = train_tiny(file, "new", *pairs, "STAGES", "[{EPOCHS: 2}]")
    assert losses[:2] == [line["from_zero"] for line in lines(new, "train")][:2]
    zero = float(torch.tensor(lines(new, "labels")[1]["clusters"]).log())
    assert [line["from_zero"] for line in lines(new, "train")][2] == pytest.approx(zero)
    assert losses[2] != pytest.approx(zero, rel=1e-3)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ("[{NAME: a}]", r"stages\[0\]\.epochs: is missing"),
        ("[{EPOCHS: 0}]", r"stages\[0\]\.epochs: expected a number from 1"),
        ("[{EPOCHS: 1}, {EPOCHS: 1, LABELS: never}]", r"stages\[1\]\.labels: expected one of"),
        ("[{EPOCHS: 1, MODEL: {WEIGHTS: a}}]", r"stages\[0\]\.model\.weights: a stage cannot"),
        ("[{EPOCHS: 1, SOLVER: {AMP: fp16}}]", r"stages\[0\]\.solver\.amp: a stage cannot"),
        ("[{EPOCHS: 1, SOLVER: {BASE_LR: x}}]", r"stages\[0\]\.solver\.base_lr: expected float"),
        ("[{EPOCHS: 1, SOLVER: {LR: 1}}]", r"stages\[0\]\.solver\.lr: unknown key"),
        ("[{EPOCHS: 1000000, REPEAT: 1000000}]", r"stages: epochs in all: expected .* 1,000,000"),
        ("{EPOCHS: 1}", r"stages: expected \[{KEY: VALUE, \.\.\.}, \.\.\.\]"),
        ("[1]", r"stages\[0\]: expected"),
    ],
)
def test_wrong_stages_are_named(stages: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(None, ["STAGES", stages])


def test_lengths_follow_from_the_stages() -> None:
    pairs = ["STAGES", "[{EPOCHS: 3, REPEAT: 2}, {EPOCHS: 1}]", "ROUNDS", "2"]
    assert load_config(None, pairs).solver.max_epochs == 14
    assert load_config(None, [*pairs, "SOLVER.MAX_EPOCHS", "14"]).solver.max_epochs == 14
    with pytest.raises(ConfigError, match="follows from stages, which have 14 epochs; got 9"):
        load_config(None, [*pairs, "SOLVER.MAX_EPOCHS", "9"])
    with pytest.raises(ConfigError, match="rounds: expected 1, since there are no stages; got 2"):
        Config(rounds=2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("CRITERION: [Tripel]", r"stages\[1\]: criterion\[0\]\.name: .*Tripel"),
        ("CRITERION: []", r"stages\[1\]: criterion: expected a list of losses"),
        ("LABELLER: {NAME: Clusters, A: 1}", r"stages\[1\]: labeller\.a"),
        ("DATALOADER: {SAMPLER: {BATCH_SIZE: 3}}", r"stages\[1\]: dataloader\.sampler"),
    ],
)
def test_parts_of_every_stage_are_checked_before_the_images(
    tmp_path: Path, change: str, problem: str
) -> None:
    from reid.workflows.train import train

    stages = f"CRITERION: [Triplet]\nSTAGES: [{{EPOCHS: 1}}, {{EPOCHS: 1, {change}}}]\n"
    absent = f"DATASETS: {{TRAIN: {{NAME: Market1501, ROOT: {tmp_path}/absent}}}}\nDEVICE: cpu\n"
    file = written(tmp_path, CONFIG + stages + absent)
    with pytest.raises(ConfigError, match=problem):
        train(load_config(file, ["OUTPUT_DIR", str(tmp_path / "run")]))
