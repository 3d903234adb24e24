"""ICE: the published numbers, data on which the published code fails, the sampler."""

from __future__ import annotations

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
from reid.modeling.heads import Neck
from reid.modeling.losses import STUDENT, Criterion
from reid.projects.ice import ICECameraLoss, ICELoss, MoreCamerasSampler
from reid.projects.ice.loss import hard_instance_nce
from reid.registry import Hook
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CPU = torch.device("cpu")
TEACHER = ("teacher", 0), ("teacher", 1), ("teacher", 2)


def read(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def given(a: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in a.items() if k.startswith(prefix)}


def embed(raw: Tensor) -> Embeddings:
    unit = F.normalize(raw, dim=1)
    return Embeddings(raw[:, None], raw[:, None], unit[:, None], unit)


def make_losses(a: dict[str, Tensor], normalize: Any = "dimensions") -> Criterion:
    ice = ICELoss(
        float(a["tau_cluster"]), float(a["smoothing"]), float(a["tau_hard"]),
        float(a["tau_soft"]), float(a["soft_weight"]), "alpha" in a,
    )  # fmt: skip
    if "tau_camera" not in a:
        return Criterion([ice])
    camera = ICECameraLoss(float(a["tau_camera"]), int(a["neg_k"]), normalize)
    return Criterion([ice, camera], [1.0, float(a["camera_weight"])], ["", "camera"])


def agree(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{what}: {float(error)}"


@pytest.mark.oracle
@pytest.mark.parametrize("normalize", ["dimensions", "proxies"])
def test_losses_and_gradients_of_the_authors(oracle_dir: Path, normalize: str) -> None:
    files = [path for path in sorted(oracle_dir.glob("ice_*.npz")) if "alpha" not in np.load(path)]
    assert files
    for path in files:
        a = read(path)
        if normalize == "proxies" and "proxy" not in a:
            continue
        cluster, camid = a["cluster_label"].long(), a["camid"].long()
        criterion = make_losses(a, normalize)
        labels = PseudoLabels.from_clusters(cluster, camid)
        criterion.set_labels(labels, FeatureSet.of(a["feature"].double(), camids=camid))
        ice, *camera = criterion
        agree(ice.centres, a["center"], 1e-6, f"{path} centres")
        for loss in camera:
            proxy = a["proxy"] if normalize == "proxies" else F.normalize(a["proxy"], dim=0)
            agree(loss.memory.rows[0], proxy, 1e-6, f"{path} proxies")
            assert torch.equal(labels.proxy_to_cluster, a["proxy_cluster"].long())
            assert torch.equal(labels.proxy_to_camera, a["proxy_camid"].long())
        for number in range(3):
            step = given(a, f"step{number}.")
            raw = step["student"].double().requires_grad_()
            teacher, weak = (embed(step[k].double()) for k in ("teacher", "teacher_weak"))
            sources = dict(zip(TEACHER, (teacher, teacher, weak), strict=True))
            index = step["index"].long()
            batch = Batch.of(torch.empty(len(raw), 0), camid[index], index)
            found = criterion({STUDENT: embed(raw), **sources}, batch)
            other = "_unit_proxies" if normalize == "proxies" else ""
            for name, value in found.items():
                key = f"{name}_loss" + (other if name == "camera" else "")
                agree(value.detach(), step[key], 1e-5, f"{path} {number} {key}")
            torch.stack([value.double() for value in found.values()]).sum().backward()
            assert raw.grad is not None
            agree(raw.grad, step[f"grad{other}"], 1e-5, f"{path} {number} gradient")


class Small(nn.Module):
    """The network of the authors' three steps."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        dim, width = state["fc.weight"].shape
        self.fc = nn.Linear(width, dim, bias=False)
        self.feat_bn = Neck(dim)
        self.load_state_dict(state, strict=False)  # num_batches_tracked is missing

    def forward(self, batch: Batch) -> Embeddings:
        return embed(self.feat_bn(self.fc(batch.image.flatten(1))))


class Batches(list[Batch]):
    """A loader of given batches."""

    @property
    def batch_sampler(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the batches are the same in every epoch."""


class Recorder(Hook):
    """Stores losses and both networks after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def after_step(self, trainer: Trainer) -> None:
        networks = {"student": trainer.model, "teacher": trainer.networks["teacher"]}
        self.steps.append(
            {f"{name}_loss" * (name != "loss") or name: v for name, v in trainer.losses.items()}
            | {f"{role}.{name}": value.clone() for role, network in networks.items()
               for name, value in network.state_dict().items()}
        )  # fmt: skip


@pytest.mark.oracle
def test_three_steps_of_student_and_teacher(oracle_dir: Path) -> None:
    files = [path for path in sorted(oracle_dir.glob("ice_*.npz")) if "alpha" in np.load(path)]
    assert files
    for path in files:
        a = read(path)
        # One image for each proxy, with the proxy as its feature; centres are then replaced.
        cluster, camid = a["proxy_cluster"].long(), a["proxy_camid"].long()
        labels = PseudoLabels.from_clusters(cluster, camid)
        criterion = make_losses(a)
        criterion.set_labels(labels, FeatureSet.of(a["proxy"], camids=camid))
        next(iter(criterion)).centres = a["center"]
        loader: Any = Batches()
        for number in range(3):
            step = given(a, f"step{number}.")
            label, camera = step["label"].long(), step["camid"].long()
            same = (label[:, None] == cluster) & (camera[:, None] == camid)
            assert bool((same.sum(1) == 1).all())
            batch = Batch.of(step["view1"], camera, same.long().argmax(1))
            loader.append(batch._replace(views=(step["view2"], step["weak"])))
        model = Small(given(a, "state.student."))
        teacher = MeanTeacher(float(a["alpha"]), ramp=False, statistics="own")
        teacher.load_state_dict({"teacher": Small(given(a, "state.teacher.")).state_dict()})
        lr = float(a["lr"])
        optimizer = build_optimizer(
            model.parameters(), "Adam", lr=lr, weight_decay=float(a["weight_decay"])
        )
        recorder = Recorder()
        Trainer(
            model, criterion, Optimization(optimizer, LearningRate(lr, 1), CPU), loader,
            max_epochs=1, device=CPU, hooks=[teacher, recorder],
        ).train()  # fmt: skip
        for number, found in enumerate(recorder.steps):
            expected = given(a, f"step{number}.")
            names = [name for name in expected if name in found]
            assert len(names) == 5 + 10
            for name in names:
                tolerance = 1e-5 if name.endswith("loss") else 1e-6
                if bool(expected[name].any()):
                    agree(found[name], expected[name], tolerance, f"{path} {number} {name}")
                else:
                    assert not bool(found[name].any())  # the frozen bias


PROXIES = [
    ([(c, k) for c in range(30) for k in range(3)], "more than 50 negatives"),
    ([(c, k) for c in range(4) for k in range(3)], "fewer than 50 others"),
    ([(c, k) for c in range(4) for k in (2, 7, 12)], "camera ids with gaps"),
    ([(c, 0) for c in range(5)], "one camera"),
    ([(c, -1) for c in range(5)], "cameras unknown"),
    ([(0, 0), (0, 1), (0, 3)], "one cluster"),
    ([(0, 0), (1, 0), (1, 2), (-1, 1), (-1, 4)], "cameras with outliers only"),
]


def problem(proxies_of: list[tuple[int, int]], images: int = 3) -> tuple[PseudoLabels, FeatureSet]:
    """Images of proxies given as (cluster, camera); cluster -1 = outliers. One dimension is 0."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.tensor([c for c, _ in proxies_of]).repeat_interleave(images)
    camids = torch.tensor([c for _, c in proxies_of]).repeat_interleave(images)
    raw = torch.randn(len(cluster), 8, generator=generator)
    raw[:, 5] = 0
    features = FeatureSet.of(F.normalize(raw, dim=1), camids=camids)
    return PseudoLabels.from_clusters(cluster, camids), features


@pytest.mark.parametrize("normalize", ["dimensions", "proxies"])
@pytest.mark.parametrize("average", ["camera", "batch"])
@pytest.mark.parametrize(("proxies_of", "what"), PROXIES)
def test_the_camera_term_is_its_definition(
    proxies_of: list[tuple[int, int]], what: str, normalize: Any, average: Any
) -> None:
    labels, features = problem(proxies_of)
    loss = ICECameraLoss(normalize=normalize, average=average)
    loss.set_labels(labels, features)
    rows = torch.stack([
        F.normalize(features.test[labels.proxy == p].mean(0), dim=0)
        for p in range(labels.num_proxies)
    ])  # fmt: skip
    if normalize == "dimensions":
        rows = rows / rows.square().sum(0).sqrt().clamp(min=1e-12)
        assert bool((rows[:, 5] == 0).all())
    index = torch.arange(0, len(labels), 2)
    raw = torch.randn(len(index), 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = loss(embed(raw), Batch.of(raw, index=index))["global_camera"]
    values, cameras = [], []
    for f, y in zip(F.normalize(raw.detach(), dim=1), labels.proxy[index].tolist(), strict=True):
        if y < 0:
            continue
        z = rows @ f / 0.07
        positive = labels.proxy_to_cluster == labels.proxy_to_cluster[y]
        hardest = z[~positive].sort(descending=True).values[:50]
        values.append((torch.logsumexp(torch.cat((z[positive], hardest)), 0) - z[positive]).mean())
        cameras.append(int(labels.proxy_to_camera[y]))
    each, camera = torch.stack(values), torch.tensor(cameras)
    expected = each.mean()
    if average == "camera":
        expected = torch.stack([each[camera == c].mean() for c in camera.unique()]).sum()
    torch.testing.assert_close(loss.memory.rows[0], rows, msg=what)
    torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=1e-5, msg=what)
    found.backward()
    assert raw.grad is not None
    assert bool(torch.isfinite(raw.grad).all()), what
    before = loss.memory.rows.clone()
    loss.commit(embed(raw), Batch.of(raw, index=index))
    assert torch.equal(loss.memory.rows, before)


@pytest.mark.parametrize(
    "label", [[0, 0, 0, 0, 1, 1, 2, 1], [0, 1, 2, 3, 3, 3, 3, 3], [0, 0, -1, 1, 1, -1, -1, 0],
              [2, 2, 2, 2, 2, 2, 2, 2], [-1, -1, -1, -1, -1, -1, -1, -1]],
)  # fmt: skip
def test_unequal_counts_one_cluster_and_outliers_in_a_batch(label: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    clusters = torch.tensor([c for c in range(4) for _ in range(4)] + [-1])
    labels = PseudoLabels.from_clusters(clusters)
    loss = ICELoss()
    loss.set_labels(labels, FeatureSet.of(F.normalize(torch.randn(17, 6, generator=generator))))
    index = torch.tensor([4 * c if c >= 0 else 16 for c in label])
    raw = torch.randn(8, 6, generator=generator).requires_grad_()
    view0, view1, weak = (embed(torch.randn(8, 6, generator=generator)) for _ in range(3))
    found = loss(embed(raw), view0, view1, weak, Batch.of(raw, index=index))
    s = (F.normalize(raw.detach(), dim=1) @ view1.test.T).tolist()
    w = (weak.test @ weak.test.T).tolist()
    used = [i for i in range(8) if label[i] >= 0]
    hard, soft, cluster = [], [], []
    for i in used:
        positive = min(s[i][j] for j in used if label[j] == label[i])
        logits = torch.tensor([positive, *(s[i][j] for j in used if label[j] != label[i])]) / 0.1
        hard.append(-logits.log_softmax(0)[0])
        p = (torch.tensor([w[i][j] for j in used]) / 0.4).softmax(0)
        q = (torch.tensor([s[i][j] for j in used]) / 0.4).log_softmax(0)
        soft.append(10 * (p * (p.log() - q)).sum())
        log_prob = (loss.centres @ raw[i].detach() / 0.5).log_softmax(0)
        cluster.append(-0.9 * log_prob[label[i]] - 0.1 * log_prob.mean())
    for name, values in (("hard", hard), ("soft", soft), ("cluster", cluster)):
        expected = torch.stack(values).mean() if values else torch.tensor(0.0)
        torch.testing.assert_close(found[name].detach(), expected, atol=1e-5, rtol=1e-5, msg=name)
    gradient = torch.autograd.grad(found["hard"], raw, retain_graph=True)[0]
    if len(set(label)) == 1:
        assert found["hard"] == 0
        assert not bool(gradient.any())
    torch.stack([*found.values()]).sum().backward()
    assert raw.grad is not None
    assert bool(torch.isfinite(raw.grad).all())


def test_half_precision_is_left_for_the_losses() -> None:
    similarity = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 0, 1, 1])
    loss = ICELoss()
    loss.set_labels(PseudoLabels.from_clusters(label), FeatureSet.of(F.normalize(similarity)))
    half = embed(similarity).map(lambda value: value.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(half, half, half, half, Batch.of(similarity, index=torch.arange(4)))
    assert {value.dtype for value in found.values()} == {torch.float32}
    unit = F.normalize(half.post[:, 0].float(), dim=1)
    torch.testing.assert_close(found["hard"], hard_instance_nce(unit @ unit.T, label, 0.1))


def test_what_is_missing_or_wrong_is_said() -> None:
    labels, features = problem([(-1, 0), (-1, 1)])
    for loss in (ICELoss(), ICECameraLoss()):
        with pytest.raises(ValueError, match=f"{type(loss).__name__}: none of 6 images has a"):
            loss.set_labels(labels, features)
        with pytest.raises(ValueError, match="needs the features"):
            loss.set_labels(labels, None)
    for options in ({"temperature": 0.0}, {"hard_temperature": -1.0}, {"soft_temperature": 0.0},
                    {"smoothing": 1.0}, {"soft_weight": -1.0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            ICELoss(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalize: expected dimensions or proxies, got 'rows'"):
        ICECameraLoss(normalize="rows")  # type: ignore[arg-type]


def picks(camids: list[int], count: int = 40) -> list[list[int]]:
    """What the sampler takes of a cluster with an image of each of these cameras, many times."""
    sampler = MoreCamerasSampler(8, images_per_identity=4, steps_per_epoch=count)
    cluster = torch.tensor([0] * len(camids) + [1] * 4)
    sampler.set_labels(PseudoLabels.from_clusters(cluster, torch.tensor([*camids, 0, 1, 2, 3])))
    images = [[draw.index for draw in batch] for batch in sampler]
    assert all(len(batch) == 8 for batch in images)
    halves = [half for batch in images for half in (batch[:4], batch[4:])]
    return [half for half in halves if max(half) < len(camids)]


def test_the_sampler_shows_a_cluster_in_many_cameras() -> None:
    for taken in picks([0, 0, 1, 2, 3, 3, 5, 9]):  # more than four cameras
        assert len({[0, 0, 1, 2, 3, 3, 5, 9][i] for i in taken}) == 4
    assert {i for taken in picks([0, 0, 1, 2, 3, 3, 5, 9]) for i in taken} == set(range(8))
    for taken in picks([0, 0, 0, 0, 7]):  # two cameras, then others without repetition
        assert 4 in taken
        assert len(set(taken)) == 4
    for taken in picks([0, 0, 7]):  # too few others: with repetition
        assert set(taken) == {0, 1, 2}
        assert taken.count(2) == 1
    repeated = picks([0, 4, 7])  # fewer than four images, all in different cameras
    assert all(len(taken) == 4 for taken in repeated)
    assert len({tuple(sorted(taken)) for taken in repeated}) > 3
    assert picks([3])[0] == [0, 0, 0, 0]
    blind = picks([-1, -1, -1, -1, -1])
    assert all(len(set(taken)) == 4 for taken in blind)
    assert {i for taken in blind for i in taken} == set(range(5))


def test_fewer_clusters_than_a_batch_takes() -> None:
    sampler = MoreCamerasSampler(32, images_per_identity=4, steps_per_epoch=2)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(12) // 4, torch.arange(12) % 2))
    assert [len(batch) for batch in sampler] == [32, 32]
