"""Stages in the trainer: what is new in each, resuming, several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.engine.hooks.refresh_labels import RefreshPseudoLabels
from reid.engine.metrics import MetricWriter
from reid.engine.optimization import Optimization
from reid.engine.stages import StageParts, Stages, carry_losses
from reid.engine.trainer import Trainer
from reid.evaluation.extract import ImageSet
from reid.labelling import Labeller
from reid.modeling.losses import Criterion, Loss
from reid.registry import Hook
from reid.solver import LearningRate, build_optimizer
from reid.stage_settings import StageRun, StageSettings, plan_stages
from reid.structures import Batch, Embeddings, FeatureSet, ImageRecord, ProgressBar, PseudoLabels

CPU = torch.device("cpu")
STAGES = [StageSettings(2, "kept", labels="once"), StageSettings(1, "new", repeat=2)]
RUNS = plan_stages(STAGES, 2)
COUNT = 12


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, batch: Batch) -> Embeddings:
        raw = self.layer(batch.image.flatten(1))
        unit = F.normalize(raw, dim=1)
        bank = unit[:, None]
        return Embeddings(raw[:, None], bank, bank, unit)


class Batches(list[Batch]):
    """A loader of given batches, and its sampler."""

    labels: PseudoLabels

    @property
    def batch_sampler(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the batches are the same in every epoch."""

    def set_labels(self, labels: PseudoLabels) -> None:
        self.labels = labels


class FromZero(Loss):
    """Cross entropy against a memory that is 0 when labels come."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, 0), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        super().set_labels(labels, features)
        self.rows = torch.zeros(labels.num_clusters, 4)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        logits = 10 * embeddings.unit[:, 0] @ self.rows.T
        return {"from_zero": F.cross_entropy(logits, self.cluster[batch.index])}

    def commit(self, embeddings: Embeddings, batch: Batch, taken: Tensor | None = None) -> None:  # type: ignore[override]
        self.rows[self.cluster[batch.index]] = embeddings.unit[:, 0]


class Prototypes(Loss):
    """Cross entropy against random parameters, with features that labels come with."""

    needs_features = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(COUNT, 4))

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        logits = embeddings.unit[:, 0] @ self.weight.T
        return {"prototypes": F.cross_entropy(logits, self.cluster[batch.index])}


class Counting(Labeller):
    """Groups of images by number, which grow each time."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun: list[tuple[int, str]] = []

    def begin_stage(self, round_number: int, ended: nn.Module | None) -> None:
        name = type(ended.losses[0]).__name__ if isinstance(ended, Criterion) else ""
        self.begun.append((round_number, name))

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        self.calls += 1
        return PseudoLabels.from_clusters(torch.arange(COUNT) // (1 + self.calls))

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = state["calls"]


class Diary(Hook):
    """Keeps the state after each epoch, and what each step saw."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}
        self.steps: list[tuple[Any, ...]] = []

    def after_step(self, trainer: Trainer) -> None:
        rate, stage = trainer.optimization.lr, trainer.stage
        self.steps.append(
            (trainer.epoch, stage.name, stage.round, stage.repetition, round(rate, 6),
             {name: float(value) for name, value in trainer.losses.items()})
        )  # fmt: skip

    def save(self, trainer: Trainer) -> None:
        self.states[trainer.epoch] = copy.deepcopy(trainer.state_dict())


class GiveLabels(Hook):
    """Gives fixed labels, without features."""

    def before_stage(self, trainer: Trainer, ended: Criterion | None) -> None:
        trainer.criterion.set_labels(PseudoLabels.from_clusters(torch.arange(COUNT) // 2), None)


def images(share: slice = slice(None)) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(COUNT, 6, 1, 1, generator=generator)
    order = torch.randperm(COUNT, generator=generator)
    return [Batch.of(image[rows[share]], index=rows[share]) for rows in order.split(4)]


def build(model: nn.Module, batches: list[Batch], run: StageRun) -> StageParts:
    criterion = Criterion([FromZero() if run.number == 0 else Prototypes()])
    parameters = [*model.parameters(), *criterion.parameters()]
    optimizer = build_optimizer(parameters, "SGD" if run.number == 0 else "Adam", lr=0.1)
    rate = LearningRate(0.1 / (1 + run.number), run.epochs, milestones=(1,), warmup_iterations=2)
    loader: Any = Batches(batches)
    return StageParts(criterion, Optimization(optimizer, rate, CPU), loader)


def staged(hooks: Sequence[Hook], batches: list[Batch]) -> Trainer:
    torch.manual_seed(0)
    model = Model()
    first = build(model, batches, RUNS[0])
    return Trainer(
        model, first.criterion, first.optimization, first.loader, max_epochs=8, device=CPU,
        hooks=hooks, stages=Stages(RUNS, lambda run: build(model, batches, run)),
    )  # fmt: skip


def labelled(folder: Path) -> tuple[Trainer, Diary, Counting, MetricWriter]:
    writer, diary, labeller = MetricWriter(folder), Diary(), Counting()
    writer.start()
    whole = Batch.of(
        torch.cat([b.image for b in images()]), index=torch.cat([b.index for b in images()])
    )
    records = [ImageRecord(f"{i}.jpg", i, 0) for i in range(COUNT)]
    unused: Any = None
    hook = RefreshPseudoLabels(
        labeller, ImageSet("train", records, [whole]), unused, unused, writer, "warn",
        {0: "once", 1: "epoch"},
    )  # fmt: skip
    return staged([diary, hook], images()), diary, labeller, writer


def test_plan() -> None:
    assert [(r.name, r.start, r.epochs, r.round, r.repetition) for r in RUNS] == [
        ("kept", 0, 2, 0, 0), ("new", 2, 1, 0, 0), ("new", 3, 1, 0, 1),
        ("kept", 4, 2, 1, 0), ("new", 6, 1, 1, 0), ("new", 7, 1, 1, 1),
    ]  # fmt: skip
    stages = Stages(RUNS, lambda run: build(Model(), [], run))
    assert [stages.at(epoch).start for epoch in range(9)] == [0, 0, 2, 3, 4, 4, 6, 7, 7]
    assert stages.title(RUNS[1]) == "Stage 2 of 6 (new): epoch 3"
    assert stages.title(RUNS[3]) == "Stage 4 of 6 (kept): epochs 5 to 6"


def test_each_stage_is_new_and_a_resume_goes_on_in_any(tmp_path: Path) -> None:
    trainer, diary, labeller, writer = labelled(tmp_path / "whole")
    trainer.train()
    writer.close()
    kept = [0.001, 0.05, 0.1] + [0.01] * 3  # a warm-up of two steps, then a milestone
    new = [0.0005, 0.02525, 0.05]
    assert [step[4] for step in diary.steps] == pytest.approx((kept + new + new) * 2, abs=6e-4)
    assert labeller.calls == 6  # once in two epochs, then in each of two stages, twice
    assert labeller.begun == [
        (0, ""), (0, "FromZero"), (0, "Prototypes"),
        (1, "Prototypes"), (1, "FromZero"), (1, "Prototypes"),
    ]  # fmt: skip
    firsts = [step[5]["loss"] for step in diary.steps if step[1] == "kept"][::3]
    sizes = [6, 0, 3, 0]  # clusters of 2 images at the 1st call, of 5 at the 4th
    for first, size in zip(firsts, sizes, strict=True):
        empty = torch.tensor(float(size)).log()  # log C while the memory is empty
        assert (first == pytest.approx(float(empty))) is bool(size)
    for epoch in range(1, 8):
        again, later, other, writer = labelled(tmp_path / str(epoch))
        again.load_state_dict(diary.states[epoch])
        again.train()
        writer.close()
        assert later.steps == [step for step in diary.steps if step[0] >= epoch], epoch
        assert torch.equal(again.model.layer.weight, trainer.model.layer.weight), epoch  # type: ignore[union-attr,arg-type]
        assert other.calls == 6


class Classifier(Loss):
    """A loss with a parameter."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start]))


def test_losses_are_carried_into_the_next_stage() -> None:
    begun = Criterion([Classifier(1.0), FromZero()])
    carry_losses(Criterion([Classifier(2.0)]), begun)
    assert begun.losses[0].state_dict()["weight"].item() == 2
    with pytest.raises(ValueError, match=r"those of the stage before \(FromZero\), .* got Class"):
        carry_losses(Criterion([FromZero()]), begun)
    wider = Classifier(1.0)
    wider.weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"Classifier cannot go on .* same options in both stages"):
        carry_losses(Criterion([Classifier(2.0)]), Criterion([wider]))
    stages = [StageSettings(1), StageSettings(2, losses="carried")]
    assert [run.losses for run in plan_stages(stages, 1)] == ["new", "carried"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stage": None}, "stage: expected a mapping"),
        ({"stage": {"first_step": 99}}, r"stage\.first_step: expected a whole number from 0 to 9"),
        ({"epoch": "3"}, "epoch: expected a whole number"),
    ],
)
def test_a_checkpoint_must_tell_its_stage(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    trainer, diary, _, writer = labelled(tmp_path)
    trainer.max_epochs = 3
    trainer.train()
    writer.close()
    with pytest.raises(ValueError, match=problem):
        staged([], images()).load_state_dict(diary.states[3] | change)


def test_memories_of_other_labels_do_not_fit(tmp_path: Path) -> None:
    trainer, diary, _, writer = labelled(tmp_path / "a")
    trainer.max_epochs = 1
    trainer.train()
    writer.close()
    state = diary.states[1]
    state["hooks"][1]["criterion"]["losses.0.rows"] = torch.zeros(5, 4)
    again, _, _, writer = labelled(tmp_path / "b")
    again.load_state_dict(state)
    with pytest.raises(ValueError, match=r"losses\.0\.rows is of shape \(5, 4\), this run's of"):
        again.train()
    writer.close()
    state["hooks"][1]["criterion"]["losses.0.rows"] = torch.full((6, 4), torch.nan)
    with pytest.raises(ValueError, match=r"losses\.0\.rows: expected finite numbers"):
        again.load_state_dict(state)


def trained(batches: list[Batch]) -> dict[str, Any]:
    diary = Diary()
    trainer = staged([GiveLabels(), diary], batches)
    trainer.train()
    return {
        "weight": trainer.model.layer.weight.detach(),
        "steps": [step[5] for step in diary.steps],
    }  # type: ignore[union-attr]


def process(rank: int, world_size: int) -> Any:
    return trained(images(slice(2 * rank, 2 * rank + 2)))


def test_two_processes_train_stages_as_one(in_two_processes: Callable[..., list[Any]]) -> None:
    # Each stage wraps the model anew; the old wrapper must not average its gradients once more.
    alone = trained(images())
    for found in in_two_processes(process):
        torch.testing.assert_close(found["weight"], alone["weight"], atol=1e-6, rtol=1e-5)
        for step, expected in zip(found["steps"], alone["steps"], strict=True):
            assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
