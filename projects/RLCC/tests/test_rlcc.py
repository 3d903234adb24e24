"""RLCC: the published numbers, data on which the published code fails, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.config import load_config
from reid.modeling.weights import read_checkpoint
from reid.projects.rlcc import RLCCLoss
from reid.projects.rlcc.consensus import clustering_consensus
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"


def close(found: Tensor, expected: Tensor, error: float, what: str) -> None:
    """Requires two arrays to differ by at most a share of the largest entry."""
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= error * largest, what


def load(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def embeddings(feature: Tensor) -> Embeddings:
    bank = feature[:, None]
    return Embeddings(bank, bank, bank, feature)


def problem(count: int = 24, dim: int = 8, seed: int = 0) -> tuple[FeatureSet, Tensor]:
    """Features of images, and a cluster for each three of them."""
    generator = torch.Generator().manual_seed(seed)
    feature = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    return FeatureSet.of(feature), torch.arange(count) // 3


class GivenLabels(RLCCLoss):
    """Takes its refined labels from outside."""

    given: Tensor | None = None

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        super().set_labels(labels, features)
        if self.given is not None:
            super().set_labels(labels, features)

    def soft_labels(self, index: Tensor) -> Tensor:
        assert self.given is not None
        return self.given[None, index]


@pytest.mark.oracle
def test_losses_gradients_and_memory_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("rlcc_memory_*.npz"))
    assert files
    for path in files:
        a = load(path)
        loss = GivenLabels(float(a["temperature"]), float(a["momentum"]), float(a["alpha"]))
        if "soft_label" in a:
            loss.given = a["soft_label"].double()
        labels = PseudoLabels.from_clusters(a["cluster_label"].long())
        loss.set_labels(labels, FeatureSet.of(a["feature"].double()))
        close(loss.memory.rows[0], a["memory"], 1e-6, path.name)
        for number in range(3):
            s = {k[6:]: v for k, v in a.items() if k.startswith(f"step{number}.")}
            index, feature = s["index"].long(), s["feature"].double().requires_grad_()
            assert torch.equal(loss.row[index], s["label"].long())
            seen = embeddings(feature), Batch.of(feature, index=index)
            value = torch.stack([*loss(*seen).values()]).sum()
            value.backward()
            loss.commit(*seen)
            assert feature.grad is not None
            what = f"{path.name} step {number}"
            close(value.detach(), s["loss"], 1e-5, what)
            close(feature.grad, s["grad"], 1e-5, what)
            close(loss.memory.rows[0], s["memory_after"], 1e-6, what)


@pytest.mark.oracle
def test_refined_labels_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("rlcc_labels*.npz"))
    assert files
    for path in files:
        a = load(path)
        assert float(a["beta"]) == 0
        loss = RLCCLoss(alpha=float(a["alpha"]), scale=float(a["temperature_softmax"]))
        for number in range(3):
            s = {k[12:]: v for k, v in a.items() if k.startswith(f"generation{number}.")}
            labels = PseudoLabels.from_clusters(s["label"].long())
            assert torch.equal(labels.cluster, s["label"].long())
            old = loss.cluster
            loss.set_labels(labels, FeatureSet.of(s["feature"].double()))
            close(loss.centers[0], s["center"], 1e-5, path.name)
            if number:
                dense = torch.zeros(s["consensus"].shape, dtype=torch.float64)
                dense[loss.old_of, loss.new_of] = loss.consensus
                close(dense, s["consensus"], 1e-5, path.name)
                close(dense[old], s["hard_soft_label"], 1e-5, path.name)
                found = loss.soft_labels(torch.arange(len(labels)))[0]
                close(found, s["soft_label"], 1e-5, path.name)
            # a moved memory does not move the centres
            loss.memory.rows.zero_()


def test_the_consensus_counts_images() -> None:
    old = torch.tensor([0, 0, 0, 1, 1, -1, 2])
    new = torch.tensor([0, 0, 1, 1, 1, 1, -1])
    found = clustering_consensus(old, new)
    dense = torch.zeros(3, 2, dtype=torch.float64)
    dense[found.old, found.new] = found.weight
    first = torch.tensor([2 / 3, 1 / 6], dtype=torch.float64)
    expected = torch.stack(
        (first / first.sum(), torch.tensor([0.0, 1.0]).double(), torch.zeros(2).double())
    )
    torch.testing.assert_close(dense, expected)


def test_images_without_a_label_in_one_of_the_epochs() -> None:
    features, cluster = problem()
    loss = RLCCLoss()
    for epoch, left_out in enumerate(([0, 1, 2, 5], [5, 7, 23], [4])):
        now = cluster.clone()
        now[left_out] = -1
        loss.set_labels(PseudoLabels.from_clusters(now), features)
        feature = features.test.clone().requires_grad_()
        values = loss(embeddings(feature), Batch.of(feature, index=torch.arange(24)))
        torch.stack([*values.values()]).sum().backward()
        assert feature.grad is not None
        assert bool(torch.isfinite(feature.grad).all())
        assert not feature.grad[left_out].any()
        assert bool(values["global_soft"] > 0) == (epoch > 0)
        if epoch:
            soft = loss.soft_labels(torch.arange(24))[0]
            assert bool((soft.sum(1) <= 1 + 1e-5).all())


def test_half_precision_does_not_overflow() -> None:
    features, cluster = problem()
    loss = RLCCLoss(temperature=0.001)
    for _ in range(2):
        loss.set_labels(PseudoLabels.from_clusters(cluster), features)
    feature = features.test.half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values = loss(embeddings(feature), Batch.of(feature, index=torch.arange(24)))
    total = torch.stack([*values.values()]).sum()
    total.backward()
    assert total.dtype == torch.float32
    assert feature.grad is not None
    assert bool(torch.isfinite(feature.grad).all())


def test_the_state_brings_the_next_labels_back() -> None:
    loss, other = RLCCLoss(), RLCCLoss()
    assert loss.memory_state() == {}
    for seed in range(2):
        features, cluster = problem(seed=seed)
        loss.set_labels(PseudoLabels.from_clusters(cluster.roll(seed)), features)
    state = loss.memory_state()
    other.check_memory_state(state, 24)
    other.load_memory_state(state)
    features, cluster = problem(seed=2)
    for each in (loss, other):
        each.set_labels(PseudoLabels.from_clusters(cluster.roll(2)), features)
    index = torch.arange(24)
    assert torch.equal(loss.soft_labels(index), other.soft_labels(index))
    for wrong, message in (
        ({}, "expected centers, cluster, generation, got nothing"),
        ({**state, "centers": state["centers"][0]}, "centers: expected"),
        ({**state, "cluster": state["cluster"] + 8}, "cluster: expected numbers from -1 to 7"),
        ({**state, "generation": torch.tensor(-1)}, "generation: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            other.check_memory_state(wrong, 24)
    with pytest.raises(ValueError, match="a run on 24 training images, but this run has 30"):
        other.check_memory_state(state, 30)
    with pytest.raises(ValueError, match="the last labels were of 24 images, these are of 12"):
        other.set_labels(PseudoLabels.from_clusters(cluster[:12]), features[:12])


def test_options_are_checked() -> None:
    for options in ({"alpha": 1.5}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="expected alpha from 0 to 1 and scale"):
            RLCCLoss(**options)


@pytest.mark.parametrize("name", ["market", "duke", "msmt"])
def test_published_hyper_parameters(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "MultiGallerySampler", "batch_size": 64, "images_per_identity": 4,
        "steps_per_epoch": 400,
    }  # fmt: skip
    assert config.clusterer == {
        "name": "SelfPacedDBSCAN", "k1": 30, "k2": 6, "eps": 0.6, "eps_gap": 0.02,
        "min_samples": 4,
    }  # fmt: skip
    assert config.criterion == [{
        "name": "RLCCLoss", "temperature": 0.04, "momentum": 0.2, "alpha": 0.9, "scale": 30,
    }]  # fmt: skip
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 5e-4)
    assert (solver.max_epochs, solver.milestones, solver.warmup_epochs) == (50, [20, 40], 0)
    assert (solver.gamma, solver.amp) == (0.1, "off")
    backbone = config.model.backbone
    assert (backbone["pool"], backbone["last_stride"]) == ("gem", 1)
    assert config.model.bn_samples_per_group == 16


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    backbone = "{NAME: TimmBackbone, MODEL: test_resnet, POOL: gem, LAST_STRIDE: 1}"
    pairs = ("MODEL.BACKBONE", backbone, "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2",
             "CLUSTERER.EPS_GAP", "0.1", "SOLVER.MAX_EPOCHS", "3",
             "MODEL.BN_SAMPLES_PER_GROUP", "8")  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert train[0]["global_soft"] == 0 < train[-1]["global_soft"]
    stopped = train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "2")
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, _ = read_checkpoint(whole / "model_final.safetensors")
    other, _ = read_checkpoint(stopped / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = [json.loads(line) for line in (stopped / "metrics.json").read_text().splitlines()]
    losses = [line["loss"] for line in train]
    assert [line["loss"] for line in again if line["kind"] == "train"] == losses
