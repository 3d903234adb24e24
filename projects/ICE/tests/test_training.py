"""ICE in training: published settings, several processes, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.assembly.images import build_transform
from reid.assembly.optimization import build_learning_rate
from reid.config import load_config
from reid.engine.optimization import Optimization
from reid.engine.teacher import MeanTeacher
from reid.engine.trainer import Trainer
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.heads import Neck
from reid.modeling.losses import Criterion
from reid.modeling.weights import read_checkpoint
from reid.projects.ice import ICECameraLoss, ICELoss
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["market", "duke", "msmt"])
def test_published_hyper_parameters(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "MoreCamerasSampler", "batch_size": 32, "images_per_identity": 4,
        "steps_per_epoch": 400,
    }  # fmt: skip
    assert config.clusterer is not None
    assert [config.clusterer[key] for key in ("k1", "k2", "eps", "min_samples")] == [30, 6, 0.55, 4]
    ice, camera = config.criterion
    temperatures = [ice[f"{key}temperature"] for key in ("", "hard_", "soft_")]
    assert [*temperatures, ice["soft_weight"], ice["smoothing"]] == [0.5, 0.1, 0.4, 10, 0.1]
    assert (camera["temperature"], camera["weight"], camera["num_negatives"]) == (0.07, 0.5, 50)
    assert (camera["normalize"], camera["average"]) == ("dimensions", "camera")
    (teacher,) = config.hooks
    assert teacher == {
        "name": "MeanTeacher", "momentum": 0.999, "ramp": False, "statistics": "own",
        "shuffle": True,
    }  # fmt: skip
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 5e-4)
    rate = build_learning_rate(solver)
    expected = [0.1 * (1 - e / 10) + e / 10 if e < 10 else 1.0 for e in range(40)]
    found = [rate(epoch) / 3.5e-4 for epoch in range(solver.max_epochs)]
    assert found == pytest.approx(expected)
    assert config.model.bn_samples_per_group == 8
    assert (config.input.size, config.test.eval_period) == ((256, 128), 1)
    strong = [step["name"] for step in config.input.transforms]
    assert strong == ["PadCrop", "RandomFlip", "RandomBlur", "RandomErasing"]
    assert config.input.transforms[2]["radius"] == [0.1, 2.0]
    assert config.input.transforms[3]["prob"] == 0.6
    for view, steps in enumerate((4, 4, 0)):
        made = build_transform(config.input, training=True, view=view)
        assert len([*made._on_pixels, *made._on_normalized]) == steps


def test_camera_agnostic_is_the_same_without_the_camera_term() -> None:
    whole = load_config(CONFIGS / "market.yaml")
    blind = load_config([CONFIGS / "market.yaml", CONFIGS / "variants" / "agnostic.yaml"])
    assert blind.criterion == whole.criterion[:1]
    blind.criterion = whole.criterion
    assert blind == whole


class Small(nn.Module):
    """A linear layer and a neck."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)
        self.neck = Neck(8)

    def forward(self, batch: Batch) -> Embeddings:
        raw = self.neck(self.layer(batch.image.flatten(1)))
        unit = F.normalize(raw, dim=1)
        return Embeddings(raw[:, None], raw[:, None], unit[:, None], unit)


class Batches(list[Batch]):
    """A loader of given batches."""

    @property
    def batch_sampler(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the batches are the same in every epoch."""


def stepped(rank: int, world_size: int) -> dict[str, Tensor]:
    """Student and teacher after three steps with a share of batches of 16."""
    torch.manual_seed(0)
    model = Small()
    group_batch_norms(model, 4)
    index, camids = torch.arange(16), torch.arange(16) % 3
    labels = PseudoLabels.from_clusters(index // 4, camids)
    criterion = Criterion([ICELoss(), ICECameraLoss()], [1.0, 0.5])
    criterion.set_labels(
        labels, FeatureSet.of(F.normalize(torch.randn(16, 8), dim=1), camids=camids)
    )
    share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
    loader: Any = Batches()
    for _ in range(3):
        views = torch.randn(3, 16, 3, 2, 2)
        batch = Batch.of(views[0], camids, index)._replace(views=(views[1], views[2]))
        loader.append(batch.map(lambda column: column[share]))
    optimizer = build_optimizer(model.parameters(), "SGD", lr=0.01)
    trainer = Trainer(
        model, criterion, Optimization(optimizer, LearningRate(0.01, 1), CPU), loader,
        max_epochs=1, device=CPU,
        hooks=[MeanTeacher(0.9, ramp=False, statistics="own", shuffle=True)],
    )  # fmt: skip
    trainer.train()
    networks = {"student": model, "teacher": trainer.networks["teacher"]}
    return {
        f"{role}.{name}": value
        for role, network in networks.items()
        for name, value in network.state_dict().items()
    }


def test_two_processes_train_as_one(in_two_processes: Callable[..., list[Any]]) -> None:
    expected = stepped(0, 1)
    for found in in_two_processes(stepped):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    pairs = ("MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1}",
             "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "TEST.EVAL_PERIOD", "0")  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert min(line[name] for line in trained for name in ("cluster", "hard", "soft", "camera")) > 0
    stopped = train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "1")
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, _ = read_checkpoint(whole / "model_final.safetensors")
    other, _ = read_checkpoint(stopped / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    state = torch.load(max(whole.glob("checkpoint_*.pth")), weights_only=True)
    student = state["model"]
    assert student.keys() >= one.keys()
    assert any(not torch.equal(student[name], one[name]) for name in one)  # this is the teacher
