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
            torch.stack([*found.values()]).sum().backward()
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
