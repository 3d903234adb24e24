"""MMT's losses: the published numbers through the trainer, the equations, unusual data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.engine.optimization import Optimization
from reid.engine.teacher import MeanTeacher
from reid.engine.trainer import Trainer
from reid.modeling.classifiers import ClusterClassifier
from reid.modeling.heads import Neck
from reid.modeling.losses import Criterion
from reid.projects.mmt import MMTLoss
from reid.projects.mmt.loss import soft_cross_entropy
from reid.registry import ConfigError, Hook
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CPU = torch.device("cpu")
ROLES = {"student": "student1", "student2": "student2", "teacher": "teacher1",
         "teacher2": "teacher2"}  # fmt: skip
"""Our names of the networks -> the authors'."""


class Net(nn.Module):
    """The network of the published numbers: a linear layer and a neck."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 16, bias=False)
        self.feat_bn = Neck(16)

    def forward(self, batch: Batch) -> Embeddings:
        raw = self.base(batch.image)
        out = self.feat_bn(raw)
        unit = F.normalize(out, dim=1)
        return Embeddings(raw[:, None], out[:, None], unit[:, None], unit)


class Batches(list[Batch]):
    """A loader of given batches."""

    @property
    def batch_sampler(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the batches are the same in every epoch."""


class Record(Hook):
    """Compares losses and all networks with the published ones after each step."""

    def __init__(self, a: dict[str, Tensor], path: Path) -> None:
        self._a = a
        self._path = path
        self.steps = 0

    def after_step(self, trainer: Trainer) -> None:
        a, step = self._a, f"step{self.steps}"
        w, v = float(a["soft_ce_weight"]), float(a["soft_tri_weight"])
        expected = {
            "cross_entropy": (1 - w) * a[f"{step}.ce"].sum(),
            "triplet": (1 - v) * a[f"{step}.tri"].sum(),
            "soft_cross_entropy": w * a[f"{step}.ce_soft"],
            "soft_triplet": v * a[f"{step}.tri_soft"],
            "loss": a[f"{step}.loss"],
        }
        for name, value in expected.items():
            close(trainer.losses[name], value, f"{self._path} {step} {name}")
        loss = next(iter(trainer.criterion))
        assert isinstance(loss, MMTLoss)
        rows = [part.weight for part in (*loss.classifiers, *loss.teacher_classifiers)]
        for (ours, theirs), row in zip(ROLES.items(), rows, strict=True):
            networks = {**trainer.students, **trainer.networks}
            for name, value in networks[ours].state_dict().items():
                if name != "feat_bn.num_batches_tracked":
                    known = a[f"{step}.{theirs}.after.{name}"]
                    close(value, known, f"{self._path} {step} {theirs} {name}")
            assert isinstance(row, Tensor)
            known = a[f"{step}.{theirs}.after.classifier.weight"][: len(row)]
            close(row, known, f"{self._path} {step} {theirs} classifier")
        self.steps += 1


def close(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found.detach() - expected).abs().max() / max(1.0, float(expected.abs().max()))
    assert error <= 1e-5, f"{what}: {float(error)}"


def state_of(a: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"state.{name}."
    return {
        key.removeprefix(start): value
        for key, value in a.items()
        if key.startswith(start) and "classifier" not in key
    }


def read(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


@pytest.mark.oracle
def test_steps_of_the_authors_trainer(oracle_dir: Path) -> None:
    """Losses, both students, both teachers and all classifiers, step by step, in the real loop."""
    files = sorted(oracle_dir.glob("mmt_*.npz"))
    assert files
    for path in files:
        a = read(path)
        students = {}
        for name in ("student", "student2"):
            students[name] = Net()
            students[name].load_state_dict(state_of(a, ROLES[name]))
        loss = MMTLoss(
            16, 2, float(a["smoothing"]), float(a["soft_ce_weight"]), float(a["soft_tri_weight"])
        )
        count = int(a["num_cluster"])
        for part, name in zip(
            (*loss.classifiers, *loss.teacher_classifiers), ROLES.values(), strict=True
        ):
            assert isinstance(part, ClusterClassifier)
            part._replace(a[f"state.{name}.classifier.weight"][:count].clone())
        loss.cluster = torch.cat([a[f"step{step}.label"] for step in range(3)]).long()
        loader: Any = Batches()
        for step in range(3):
            one, other = a[f"step{step}.input1"], a[f"step{step}.input2"]
            index = torch.arange(16) + 16 * step
            loader.append(Batch.of(one, index=index)._replace(views=(other,)))
        teachers = []
        for name, student in (("teacher", "student"), ("teacher2", "student2")):
            hook = MeanTeacher(float(a["alpha"]), statistics="own", student=student, teacher=name)
            hook.load_state_dict({"teacher": state_of(a, ROLES[name])})
            teachers.append(hook)
        criterion = Criterion([loss])
        parameters = [p for net in students.values() for p in net.named_parameters()]
        rate, decay = float(a["lr"]), float(a["weight_decay"])
        optimizer = build_optimizer(
            [*parameters, *criterion.named_parameters()], "Adam", lr=rate, weight_decay=decay
        )
        record = Record(a, path)
        trainer = Trainer(
            students["student"], criterion, Optimization(optimizer, LearningRate(rate, 1), CPU),
            loader, max_epochs=1, device=CPU, hooks=[*teachers, record],
            more_students={"student2": students["student2"]},
        )  # fmt: skip
        trainer.step = int(a["epoch"] * a["iterations"])
        trainer.train()
        assert record.steps == 3


@pytest.mark.oracle
def test_gradients_of_the_authors(oracle_dir: Path) -> None:
    """Of logits and raw features; those through the neck are in the step after them."""
    for path in sorted(oracle_dir.glob("mmt_*.npz")):
        a = read(path)
        count = int(a["num_cluster"])
        loss = MMTLoss(
            count, 2, float(a["smoothing"]), float(a["soft_ce_weight"]), float(a["soft_tri_weight"])
        )
        for part in (*loss.classifiers, *loss.teacher_classifiers):
            assert isinstance(part, ClusterClassifier)
            part._replace(torch.eye(count))  # the features after the neck are then the logits
        for step in range(3):
            loss.cluster = a[f"step{step}.label"].long()
            given, logits = [], {}
            for name in ROLES.values():
                raw = a[f"step{step}.{name}.feature"]
                logits[name] = a[f"step{step}.{name}.logit"][:, :count].clone().requires_grad_()
                given.append(seen(raw, logits[name]))
            batch = Batch.of(torch.zeros(16, 1))
            torch.stack([*loss(*given, batch).values()]).sum().backward()  # type: ignore[no-untyped-call]
            for name in ("student1", "student2"):
                expected = a[f"step{step}.{name}.grad_logit"][:, :count]
                found = logits[name].grad
                assert found is not None
                error = (found - expected).abs().max() / expected.abs().max()
                assert error < 1e-4, (path, step, name)
            assert logits["teacher1"].grad is None


def seen(raw: Tensor, after: Tensor) -> Embeddings:
    unit = F.normalize(after, dim=1)
    return Embeddings(raw[:, None], after[:, None], unit[:, None], unit)


def problem(
    clusters: list[int], students: int = 2, dim: int = 8
) -> tuple[MMTLoss, list[Embeddings], Batch]:
    """A loss with labels, and what it is given for all the images."""
    generator = torch.Generator().manual_seed(0)
    loss = MMTLoss(dim, students)
    cluster = torch.tensor(clusters)
    unit = F.normalize(torch.randn(len(cluster), dim, generator=generator), dim=1)
    loss.set_labels(PseudoLabels.from_clusters(cluster), FeatureSet.of(unit))
    given = []
    for _ in loss.asks_for:
        raw, after = torch.randn(2, len(cluster), dim, generator=generator)
        given.append(seen(raw.requires_grad_(), after.requires_grad_()))
    return loss, given, Batch.of(torch.zeros(len(cluster), 1))


def test_losses_are_the_equations() -> None:
    clusters = [0, 0, 0, 1, 1, 2, 2, 2]
    loss, given, batch = problem(clusters)
    count, rows = 3, [part.weight for part in (*loss.classifiers, *loss.teacher_classifiers)]
    logits = [
        one.post[:, 0].double() @ row.double().T  # type: ignore[union-attr]
        for one, row in zip(given, rows, strict=True)
    ]
    logits = [given_logits.detach() for given_logits in logits]
    raw = [one.pre[:, 0].detach().double() for one in given]
    expected = dict.fromkeys(
        ("cross_entropy", "triplet", "soft_cross_entropy", "soft_triplet"), 0.0
    )
    for a, b in ((0, 3), (1, 2)):  # a student, and the other's teacher
        for i, label in enumerate(clusters):
            p, q = logits[a][i].softmax(0), logits[b][i].softmax(0)
            for k in range(count):
                target = 0.1 / count + (0.9 if k == label else 0)
                expected["cross_entropy"] -= 0.5 * target * math.log(p[k]) / 8
                expected["soft_cross_entropy"] -= 0.5 * float(q[k]) * math.log(p[k]) / 8
            d = [float((raw[a][i] - raw[a][j]).norm()) for j in range(8)]
            far = max((j for j in range(8) if clusters[j] == label), key=lambda j: d[j])
            near = min((j for j in range(8) if clusters[j] != label), key=lambda j: d[j])
            dp, dn = (float((raw[b][i] - raw[b][j]).norm()) for j in (far, near))
            pi = math.exp(dp) / (math.exp(dp) + math.exp(dn))
            close_to, apart = (
                math.log1p(math.exp(x)) for x in (d[far] - d[near], d[near] - d[far])
            )
            expected["triplet"] += 0.2 * close_to / 8
            expected["soft_triplet"] += 0.8 * (pi * apart + (1 - pi) * close_to) / 8
    found = loss(*given, batch)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, 1e-5)


def test_one_student_learns_from_its_own_teacher_and_hard_labels_from_none() -> None:
    one = MMTLoss(8, 1)
    assert one.asks_for == (("student", 0), ("teacher", 1))
    loss, given, batch = problem([0, 0, 1, 1], students=1)
    found = loss(*given, batch)
    rows = [part.weight for part in (*loss.classifiers, *loss.teacher_classifiers)]
    logits = [one.post[:, 0] @ row.T for one, row in zip(given, rows, strict=True)]  # type: ignore[union-attr]
    torch.testing.assert_close(
        found["soft_cross_entropy"], 0.5 * soft_cross_entropy(*logits).mean()
    )
    hard = MMTLoss(8, 1, soft_ce_weight=0.0, soft_triplet_weight=0.0)
    assert hard.asks_for == (("student", 0),)
    hard.set_labels(PseudoLabels.from_clusters(loss.cluster), FeatureSet.of(given[0].test.detach()))
    assert hard(given[0], batch).keys() == {"cross_entropy", "triplet"}
    assert hard.followers("teacher") == []


def test_gradients_reach_both_students_and_no_teacher() -> None:
    loss, given, batch = problem([0, 0, 1, 1, 1])
    total = torch.stack([*loss(*given, batch).values()]).sum()
    for number, one in enumerate(given):
        found = torch.autograd.grad(total, [one.pre, one.post], None, True, allow_unused=True)
        assert all((gradient is not None) == (number < 2) for gradient in found)


def test_classifiers_of_all_networks_become_the_means_of_the_clusters() -> None:
    loss, _, _ = problem([0, 0, 1, -1, 1, 1])
    before = loss.classifiers[0].weight
    generator = torch.Generator().manual_seed(3)
    feature = torch.randn(6, 8, generator=generator)  # means of two networks are no unit vectors
    loss.set_labels(
        PseudoLabels.from_clusters(torch.tensor([2, 0, 1, 2, -1, 0])), FeatureSet.of(feature)
    )
    means = [feature[[1, 5]].mean(0), feature[2], feature[[0, 3]].mean(0)]
    expected = F.normalize(torch.stack(means), dim=1)
    for part in (*loss.classifiers, *loss.teacher_classifiers):
        torch.testing.assert_close(part.weight.detach(), expected)  # type: ignore[operator]
    assert loss.classifiers[0].weight is before, "the optimizer goes on training it"
    trained = [name for name, p in loss.named_parameters() if p.requires_grad]
    assert trained == ["classifiers.0.weight", "classifiers.1.weight"]


def test_a_cluster_of_one_image_is_its_own_farthest_positive() -> None:
    loss, given, batch = problem([0, 1, 1, 1])
    raw = given[0].pre[:, 0]
    distance = torch.cdist(raw, raw)
    expected = F.softplus(1e-6 - distance[0, 1:].min())
    only = Batch.of(torch.zeros(4, 1), index=batch.index)
    loss.cluster = torch.tensor([0, 1, 1, 1])
    parts = [F.softplus(distance[i, 1:].max() - distance[i, 0]) for i in (1, 2, 3)]
    values = loss._losses(raw, torch.zeros(4, 2), loss.cluster, None)
    torch.testing.assert_close(values["triplet"], 0.2 * torch.stack([expected, *parts]).mean())
    assert all(torch.isfinite(value) for value in loss(*given, only).values())


def test_images_without_a_label_do_not_count_and_one_cluster_has_no_triplets() -> None:
    loss, given, _ = problem([0, 0, 1, 1, -1, -1])
    batch = Batch.of(torch.zeros(6, 1))
    whole = loss(*given, batch)
    some = [one.map(lambda column: column[:4]) for one in given]
    part = loss(*some, Batch.of(torch.zeros(4, 1)))
    for name, value in whole.items():
        torch.testing.assert_close(value, part[name])
    loss, given, batch = problem([0, 0, 0])
    found = loss(*given, batch)
    assert all(value.item() == 0 for value in found.values())


def test_losses_are_in_single_precision_under_autocast() -> None:
    loss, given, batch = problem([0, 0, 1, 1])
    plain = loss(*given, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(*given, batch) == plain


def test_more_clusters_than_fit_a_fixed_classifier() -> None:
    loss, given, batch = problem([*range(40), *range(40)])
    assert all(part.weight.shape == (40, 8) for part in loss.classifiers)
    assert all(torch.isfinite(value) for value in loss(*given, batch).values())


def test_what_is_refused() -> None:
    loss = MMTLoss(8)
    labels = PseudoLabels.from_clusters(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="needs the features"):
        loss.set_labels(labels, None)
    with pytest.raises(ValueError, match="none of 2 images has a label"):
        loss.set_labels(
            PseudoLabels.from_clusters(torch.tensor([-1, -1])), FeatureSet.of(torch.eye(2))
        )
    for options in ({"students": 0}, {"smoothing": 1.0}, {"soft_ce_weight": 1.5}):
        with pytest.raises(ValueError, match="expected"):
            MMTLoss(8, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another name"):
        MeanTeacher(student="student", teacher="student")


def test_a_missing_student_is_named() -> None:
    model = Net()
    loss, _, _ = problem([0, 0, 1, 1], dim=16)
    optimizer = build_optimizer([*model.named_parameters()], "Adam", lr=0.1)
    loader: Any = Batches([Batch.of(torch.randn(4, 12))._replace(views=(torch.randn(4, 12),))])
    for hooks, message in (
        ([MeanTeacher(student="student2")], r"student 'student2' does not exist.*model\.students"),
        ([MeanTeacher(), MeanTeacher()], "the name of another network"),
        ([MeanTeacher()], "asks for the network student2, the run has student, teacher"),
    ):
        trainer = Trainer(
            model, Criterion([loss]), Optimization(optimizer, LearningRate(0.1, 1), CPU), loader,
            max_epochs=1, device=CPU, hooks=hooks,
        )  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            trainer.train()
