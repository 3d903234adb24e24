"""MultiCentroid: its definition written sample by sample, difficult data, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid import distributed
from reid.config import load_config
from reid.modeling.losses import Criterion
from reid.modeling.weights import read_checkpoint
from reid.projects.multicentroid import CentroidMemory, MultiCentroidLoss
from reid.projects.multicentroid import loss as loss_module
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"


def problem(clusters: int, images: int = 5, banks: int = 1) -> tuple[PseudoLabels, FeatureSet]:
    """Clusters of so many images, with an outlier after each."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.tensor([c for c in range(clusters) for c in [c] * images + [-1]])
    unit = F.normalize(torch.randn(len(cluster), banks, 6, generator=generator), dim=2)
    return PseudoLabels.from_clusters(cluster), FeatureSet.of(unit[:, 0], unit=unit)


def embed(unit: Tensor) -> Embeddings:
    return Embeddings(unit, unit, unit, unit[:, 0])


def plain_loss(f: Tensor, y: int, rows: Tensor, interpolated: int) -> Tensor:
    """The loss of one sample, as the README writes it; rows (C, n, D)."""
    count, n, _ = rows.shape
    positive = (rows[y] @ f).sort().values[(n - 1) // 2]
    chosen = [(rows[c] @ f).argmax() for c in range(count)]
    negatives = {c: rows[c, chosen[c]] for c in range(count) if c != y}
    scores = [c @ f for c in negatives.values()]
    hardest = sorted(negatives, key=lambda c: -float(negatives[c] @ f.detach()))[:interpolated]
    for c in hardest:
        others = [rows[k, i] for k in range(count) if k not in (c, y) for i in range(n)]
        if others:
            nearest = max(others, key=lambda other, c=c: float(other @ negatives[c]))
            scores.append(F.normalize(negatives[c] + nearest, dim=0) @ f)
    logits = torch.stack([positive, *scores]) / 0.05
    return torch.logsumexp(logits, 0) - logits[0]


@pytest.mark.parametrize(
    ("clusters", "interpolated", "block"),
    [(9, 3, 2**24), (9, 50, 1), (9, 3, 9 * 4 * 3 * 4), (3, 50, 2**24), (2, 50, 2**24),
     (1, 50, 2**24), (6, 0, 2**24)],
)  # fmt: skip
@pytest.mark.parametrize("banks", [1, 3])
def test_the_loss_is_its_definition(
    clusters: int, interpolated: int, block: int, banks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_BLOCK", block)
    labels, features = problem(clusters, banks=banks)
    loss = MultiCentroidLoss(num_interpolated=interpolated)
    loss.set_labels(labels, features)
    rows = loss.memory.centroids.clone()
    index = torch.arange(0, len(labels), 2)
    raw = torch.randn(len(index), banks, 6, generator=torch.Generator().manual_seed(1))
    unit = F.normalize(raw, dim=2).requires_grad_()
    found = loss(embed(unit), Batch.of(raw, index=index))
    plain = unit.detach().clone().requires_grad_()
    values = torch.stack([
        torch.stack([plain_loss(plain[i, m], y, rows[m], interpolated) for m in range(banks)])
        for i, y in enumerate(labels.cluster[index].tolist()) if y >= 0
    ]).mean(0)  # fmt: skip
    torch.testing.assert_close(found["global_contrast"], values[0], atol=1e-5, rtol=1e-5)
    total, expected = found["global_contrast"], values[0]
    if banks > 1:
        torch.testing.assert_close(
            found["part_contrast"], 0.1 * values[1:].mean(), atol=1e-5, rtol=1e-5
        )
        total, expected = total + found["part_contrast"], expected + 0.1 * values[1:].mean()
    if clusters == 1:
        assert total == 0
    total.backward()
    assert unit.grad is not None
    if clusters == 1:
        assert not bool(unit.grad.any())
        return
    expected.backward()
    torch.testing.assert_close(unit.grad, plain.grad, atol=1e-5, rtol=1e-5)
    assert torch.equal(loss.memory.centroids, rows)  # a forward pass changes nothing


def test_the_nearest_centroid_moves_sample_by_sample() -> None:
    labels, features = problem(3, banks=2)
    loss = MultiCentroidLoss()
    loss.set_labels(labels, features)
    rows = loss.memory.centroids.clone()
    index = torch.tensor([0, 7, 1, 2, 5, 8, 3, 0, 13])  # 5 is an outlier, 0 comes twice
    unit = F.normalize(torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(3)), dim=2)
    for i, y in enumerate(labels.cluster[index].tolist()):
        for m in range(2):
            if y >= 0:
                k = int((rows[m, y] @ unit[i, m]).argmax())
                rows[m, y, k] = F.normalize(0.2 * rows[m, y, k] + 0.8 * unit[i, m], dim=0)
    before = loss.memory.centroids.clone()
    batch = Batch.of(unit, index=index)
    loss.commit(embed(unit), batch, taken=torch.tensor(False))
    assert torch.equal(loss.memory.centroids, before)
    loss.commit(embed(unit), batch)
    torch.testing.assert_close(loss.memory.centroids, rows)
    assert not torch.allclose(rows, before)


def test_centroids_start_as_images_of_their_cluster() -> None:
    cluster = torch.tensor([0] * 6 + [1, 1, 2] + [-1])
    features = FeatureSet.of(F.normalize(torch.randn(10, 5), dim=1))
    memory = CentroidMemory(0.2, 4)
    draws = []
    for draw in (0, 0, 1):
        memory.draw = draw
        memory.reset(cluster, 3, features)
        same = (memory.centroids[0, :, :, None] == features.test).all(3)  # (C, n, N)
        assert bool((same.sum(2) == 1).all())
        image = same.long().argmax(2)
        assert len(image[0].unique()) == 4  # without repetition, where there are enough
        assert torch.equal(cluster[image], torch.arange(3)[:, None].expand(3, 4))
        draws.append(image)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_each_epoch_draws_anew() -> None:
    labels, features = problem(3, images=9)
    loss = MultiCentroidLoss()
    criterion = Criterion([loss])
    seen = []
    for epoch in (0, 1, 0):
        criterion.set_epoch(epoch)
        criterion.set_labels(labels, features)
        seen.append(loss.memory.rows.clone())
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_what_is_missing_or_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="num_centroids: expected 1 or more, got 0"):
        MultiCentroidLoss(num_centroids=0)
    with pytest.raises(ValueError, match="num_interpolated: expected 0 or more, got -1"):
        MultiCentroidLoss(num_interpolated=-1)
    labels = PseudoLabels.from_clusters(torch.full((4,), -1))
    with pytest.raises(ValueError, match="MultiCentroidLoss: none of 4 images has a label"):
        MultiCentroidLoss().set_labels(labels, FeatureSet.of(torch.eye(4)))


def stepped(rank: int, world_size: int) -> Tensor:
    """The memory after a batch that the processes share."""
    torch.manual_seed(rank)  # other random numbers in each process must not matter
    labels, features = problem(4)
    loss = MultiCentroidLoss()
    loss.set_labels(labels, features)
    index = torch.arange(0, 24, 2)
    unit = F.normalize(torch.randn(12, 1, 6, generator=torch.Generator().manual_seed(5)), dim=2)
    share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    batch = Batch.of(unit[share], index=index[share]).map(distributed.gather_rows)
    loss.commit(embed(unit[share]).map(distributed.gather_rows), batch)
    return loss.memory.rows


def test_two_processes_hold_the_memory_of_one(in_two_processes: Callable[..., list[Any]]) -> None:
    expected = stepped(0, 1)
    for found in in_two_processes(stepped):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "steps"), [("market", 200), ("duke", 200), ("msmt", 400)])
def test_settings_are_those_of_our_definition(name: str, steps: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "CrossCameraSampler", "batch_size": 64, "images_per_identity": 4,
        "steps_per_epoch": steps,
    }  # fmt: skip
    assert config.criterion == [{
        "name": "MultiCentroidLoss", "temperature": 0.05, "momentum": 0.2, "num_centroids": 4,
        "num_interpolated": 50,
    }]  # fmt: skip
    assert config.model.bn_samples_per_group == 16
    contrast: Any = load_config(CONFIGS.parents[1] / "ClusterContrast" / "configs" / f"{name}.yaml")
    assert (config.clusterer, config.solver) == (contrast.clusterer, contrast.solver)
    assert (config.input, config.test) == (contrast.input, contrast.test)
    assert config.model.backbone == contrast.model.backbone


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    pairs = ("MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet, POOL: gem}",
             "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "TEST.EVAL_PERIOD", "0")  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    assert min(line["global_contrast"] for line in lines if line["kind"] == "train") > 0
    stopped = train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "1")
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, _ = read_checkpoint(whole / "model_final.safetensors")
    other, _ = read_checkpoint(stopped / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
