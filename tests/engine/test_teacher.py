"""The teacher: its parameters, its running statistics, its groups of images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reid.engine.nonfinite import NonFiniteLosses
from reid.engine.optimization import Optimization
from reid.engine.stages import StageParts, Stages
from reid.engine.teacher import MeanTeacher
from reid.engine.trainer import Trainer
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.heads import Neck
from reid.modeling.losses import STUDENT, Criterion, Loss
from reid.registry import Hook
from reid.solver import LearningRate, build_optimizer
from reid.stage_settings import StageRun
from reid.structures import Batch, Embeddings

CPU = torch.device("cpu")
STATISTICS = ("neck.running_mean", "neck.running_var")


class Net(nn.Module):
    """A linear layer and a neck."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 5)
        self.neck = Neck(5)

    def forward(self, batch: Batch) -> Embeddings:
        out = self.neck(self.layer(batch.image.flatten(1)))
        return Embeddings(out[:, None], out[:, None], out[:, None], out)


class Consistency(Loss):
    """The student's view against the teacher's other one; the teacher also sees the first."""

    asks_for = (STUDENT, ("teacher", 0), ("teacher", 1))

    def forward(
        self, student: Embeddings, _: Embeddings, teacher: Embeddings, batch: Batch
    ) -> dict[str, Tensor]:
        return {"consistency": (student.test - teacher.test).square().mean()}


class Batches(list[Batch]):
    """A loader of given batches."""

    @property
    def batch_sampler(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the batches are the same in every epoch."""


class Students(Hook):
    """Stores the student after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def after_step(self, trainer: Trainer) -> None:
        self.states.append(copy.deepcopy(trainer.model.state_dict()))


def batches(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 2, 8, 3, 2, 2, generator=generator)
    return [Batch.of(one)._replace(views=(other,)) for one, other in image]


def train(
    teacher: MeanTeacher, given: list[Batch], *, groups: int = 0, step: int = 0,
    state: dict[str, Tensor] | None = None, loss: Loss | None = None, amp: Any = "off",
    **options: Any,
) -> tuple[nn.Module, list[dict[str, Tensor]]]:  # fmt: skip
    """The teacher after an epoch of the given batches, and the student after each."""
    model = Net()
    if groups:
        group_batch_norms(model, groups)
    if state is not None:
        model.load_state_dict(state)
    loader: Any = Batches(given)
    optimizer = build_optimizer(model.parameters(), "SGD", lr=0.1, momentum=0.0)
    students = Students()
    trainer = Trainer(
        model, Criterion([loss or Consistency()]),
        Optimization(optimizer, LearningRate(0.1, 1), CPU, may_skip=True, amp=amp), loader,
        max_epochs=1, device=CPU, hooks=[teacher, students], **options,
    )  # fmt: skip
    trainer.step = step
    trainer.train()
    assert trainer.inference_model is trainer.networks["teacher"]
    return trainer.networks["teacher"], students.states


@pytest.mark.parametrize("statistics", ["own", "copy"])
def test_parameters_are_averaged_and_statistics_are_those_asked_for(statistics: Any) -> None:
    found, students = train(MeanTeacher(0.9, ramp=False, statistics=statistics), batches())
    mirror = Net()
    for batch, student in zip(batches(), students, strict=True):
        mirror(batch)
        mirror(batch._replace(image=batch.views[0]))
        with torch.no_grad():
            for name, parameter in mirror.named_parameters():
                parameter.mul_(0.9).add_(0.1 * student[name])
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, dict(mirror.named_parameters())[name].detach())
    expected = mirror.state_dict() if statistics == "own" else students[-1]
    for name in STATISTICS:
        torch.testing.assert_close(found.state_dict()[name], expected[name])
    assert int(found.state_dict()["neck.num_batches_tracked"]) == (6 if statistics == "own" else 3)
    assert not torch.equal(mirror.state_dict()[STATISTICS[0]], students[-1][STATISTICS[0]])


def test_with_a_ramp_the_first_step_copies_the_student() -> None:
    found, students = train(MeanTeacher(0.9), batches(1))
    for name, value in found.state_dict().items():
        assert torch.equal(value, students[0][name])


@pytest.mark.parametrize("broken", ["image", "view"])
def test_a_skipped_batch_does_not_move_the_teacher(broken: str) -> None:
    first, second, third = batches()
    nothing = torch.full_like(second.image, torch.nan)
    bad = second._replace(**{"image": nothing} if broken == "image" else {"views": (nothing,)})
    whole, _ = train(MeanTeacher(ramp=False, statistics="own"), [first, third])
    skipping = NonFiniteLosses("skip")
    found, _ = train(
        MeanTeacher(ramp=False, statistics="own"), [first, bad, third], nonfinite=skipping
    )
    assert skipping.skipped == 1
    for name, value in whole.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_an_fp16_step_that_overflows_does_not_move_the_teacher() -> None:
    class Huge(Consistency):
        def forward(self, *inputs: Any) -> dict[str, Tensor]:
            return {"huge": 1e35 * inputs[0].test.square().mean()}

    found, _ = train(MeanTeacher(ramp=False, statistics="own"), batches(1), loss=Huge(), amp="fp16")
    for name, value in Net().state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_statistics_that_are_not_finite_end_the_run() -> None:
    class Sight(Consistency):
        def forward(self, *inputs: Any) -> dict[str, Tensor]:
            return {"sight": inputs[0].test.square().mean()}

    (batch,) = batches(1)
    bad: Any = Batches([batch._replace(views=(torch.full_like(batch.image, torch.inf),))])
    model = Net()
    optimizer = build_optimizer(model.parameters(), "SGD", lr=0.1)
    trainer = Trainer(
        model, Criterion([Sight()]), Optimization(optimizer, LearningRate(0.1, 1), CPU), bad,
        max_epochs=1, device=CPU, hooks=[MeanTeacher(statistics="own")],
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"neck\.running_mean"):
        trainer.train()


def test_a_teacher_may_begin_in_a_later_stage() -> None:
    """Before, it equals the student; the ramp then counts from there."""
    made: list[tuple[MeanTeacher, list[dict[str, Tensor]]]] = []
    for ramp in (True, False):
        teacher, found = MeanTeacher(0.9, ramp, statistics="own", from_stage=1), []
        model, given = Net(), batches(4)
        optimizer = build_optimizer(model.parameters(), "SGD", lr=0.1, momentum=0.0)

        class Teachers(Hook):
            def after_step(self, trainer: Trainer, found: Any = found) -> None:
                found.append(copy.deepcopy(trainer.networks["teacher"].state_dict()))
                found.append(copy.deepcopy(trainer.model.state_dict()))

        def parts(run: StageRun, model: Any = model, given: Any = given) -> StageParts:
            loader: Any = Batches(given[2 * run.number : 2 * run.number + 2])
            optimizer = build_optimizer(model.parameters(), "SGD", lr=0.1, momentum=0.0)
            optimization = Optimization(optimizer, LearningRate(0.1, 1), CPU)
            return StageParts(Criterion([Consistency()]), optimization, loader)

        stages = Stages([StageRun(0, "", 0, 1), StageRun(1, "", 1, 1)], parts)
        first: Any = Batches(given[:2])
        Trainer(
            model, Criterion([Consistency()]),
            Optimization(optimizer, LearningRate(0.1, 1), CPU), first, max_epochs=2, device=CPU,
            hooks=[teacher, Teachers()], stages=stages,
        ).train()  # fmt: skip
        made.append((teacher, found))
    for (teacher, found), ramp in zip(made, (True, False), strict=True):
        assert teacher.state_dict()["first_step"] == 2
        for step in range(2):
            for name, value in found[2 * step].items():
                assert torch.equal(value, found[2 * step + 1][name]), (step, name)
        for step in (2, 3):
            keep = 1 - 1 / (step - 1) if ramp else 0.9
            for name in ("layer.weight", "neck.weight"):
                before, after, student = found[2 * step - 2], found[2 * step], found[2 * step + 1]
                expected = keep * before[name] + (1 - keep) * student[name]
                torch.testing.assert_close(after[name], expected)


def test_groups_are_random_in_each_step_and_after_a_resumption() -> None:
    def make() -> MeanTeacher:
        return MeanTeacher(ramp=False, statistics="own", shuffle=True)

    given = batches()
    found, students = train(make(), given, groups=4)
    mirror = Net()
    parameters = dict(mirror.named_parameters())
    for step, batch in enumerate(given):
        place = torch.randperm(8, generator=torch.Generator().manual_seed(step))
        for image in (batch.image, batch.views[0]):
            mirror(batch._replace(image=image[place < 4]))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.lerp_(students[step][name], 0.001)
    for name in STATISTICS:
        torch.testing.assert_close(found.state_dict()[name], mirror.state_dict()[name])
    first = make()
    train(first, given[:1], groups=4)
    second = make()
    second.load_state_dict(first.state_dict())
    resumed, _ = train(second, given[1:], groups=4, step=1, state=students[0])
    for name, value in found.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
