"""ClusterEnsemble: the equations sample by sample, unusual data, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.config import load_config
from reid.modeling.weights import read_checkpoint
from reid.neighbors import dbscan, jaccard_distance
from reid.projects.clusterensemble import EnsembleDBSCAN, EnsembleLoss
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"


def problem(cluster: list[int], *votes: list[int]) -> tuple[PseudoLabels, FeatureSet]:
    """Labels with those of other clusterings, and features of the images."""
    generator = torch.Generator().manual_seed(0)
    feature = F.normalize(torch.randn(len(cluster), 8, generator=generator).double(), dim=1)
    labels = PseudoLabels.from_clusters(torch.tensor(cluster))
    others = {f"{number}": torch.tensor(vote) for number, vote in enumerate(votes)}
    return replace(labels, side=others), FeatureSet.of(feature)


def plain_losses(f: Tensor, i: int, rows: Tensor, runs: list[Tensor], negatives: int) -> Tensor:
    """Both losses of image i, as the README writes them."""
    cluster = runs[0]
    means = [rows[cluster == c].mean(0) for c in range(int(cluster.max()) + 1)]
    z = torch.stack([F.normalize(mean, dim=0) @ f for mean in means]) / 0.05
    first = z.logsumexp(0) - z[cluster[i]]
    e = (rows @ f / 0.05).exp()
    others = e[(cluster != cluster[i]) & (cluster != -1)].sort(descending=True).values
    total = others[:negatives].sum()
    positives = (cluster == cluster[i]).nonzero()[:, 0].tolist()
    weight = [sum(int(r[i] == r[j] != -1) for r in runs) / len(runs) for j in positives]
    terms = [w * -(e[j] / (e[j] + total)).log() for w, j in zip(weight, positives, strict=True)]
    return torch.stack((first, torch.stack(terms).sum() / sum(weight)))


@pytest.mark.parametrize("negatives", [2, 50])
def test_losses_are_the_definition(negatives: int) -> None:
    labels, features = problem(
        [0, 0, 0, 0, 1, 1, 1, 2, 2, -1], [0, 0, 1, 1, 2, 2, -1, -1, -1, -1],
        [5, 5, 5, 6, 2, 2, 2, 4, 4, 4],
    )  # fmt: skip
    loss = EnsembleLoss(num_negatives=negatives)
    loss.set_labels(labels, features)
    runs = [labels.cluster, *labels.side.values()]
    index = torch.tensor([0, 2, 6, 7, 9, 0])
    given = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double())
    for _ in range(2):  # then with a memory that has moved
        f = given.clone().requires_grad_()
        plain = given.clone().requires_grad_()
        seen = Embeddings(f[:, None], f[:, None], f[:, None], f), Batch.of(f, index=index)
        values = loss(*seen)
        rows = loss.memory.rows[0].clone()
        expected = torch.stack([
            plain_losses(plain[place], i, rows, runs, negatives)
            for place, i in enumerate(index.tolist()) if i != 9
        ]).mean(0)  # fmt: skip
        for found, value in zip(values.values(), expected, strict=True):
            torch.testing.assert_close(found, value)
        torch.stack([*values.values()]).sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(f.grad, plain.grad)
        loss.commit(*seen)
        assert not torch.equal(loss.memory.rows[0], rows)


def test_one_cluster_gives_nothing() -> None:
    labels, features = problem([0] * 6, [0, 0, 0, 1, 1, 1])
    loss = EnsembleLoss()
    loss.set_labels(labels, features)
    f = features.test.clone().requires_grad_()
    seen = Embeddings(f[:, None], f[:, None], f[:, None], f), Batch.of(f, index=torch.arange(6))
    values = loss(*seen)
    assert all(float(value.detach().abs()) < 1e-12 for value in values.values())
    torch.stack([*values.values()]).sum().backward()
    assert f.grad is not None
    assert float(f.grad.abs().max()) < 1e-12


def test_half_precision_does_not_overflow() -> None:
    labels, features = problem([0, 0, 1, 1])
    loss = EnsembleLoss(temperature=0.001)
    loss.set_labels(labels, FeatureSet.of(features.test.float()))
    f = features.test.half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        seen = Embeddings(f[:, None], f[:, None], f[:, None], f), Batch.of(f, index=torch.arange(4))
        total = torch.stack([*loss(*seen).values()]).sum()
    total.backward()
    assert total.dtype == torch.float32
    assert f.grad is not None
    assert bool(torch.isfinite(f.grad).all())


def test_the_clusterings_are_dbscan_on_one_graph() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(8, 16, generator=generator).repeat_interleave(10, 0)
    feature = F.normalize(centers + 0.8 * torch.randn(80, 16, generator=generator), dim=1)
    camids = torch.arange(80) % 2
    labels = EnsembleDBSCAN(10, (0.4, 0.5, 0.6))(FeatureSet.of(feature, camids=camids))
    graph = jaccard_distance(feature, 10, 6)
    assert labels.side.keys() == {"0.4", "0.5"}
    for name, found in (*labels.side.items(), ("0.6", labels.cluster)):
        assert torch.equal(found, torch.from_numpy(dbscan(graph, float(name), 4)))
    assert set(labels.proxy_to_camera.tolist()) == {0, 1}
    assert not torch.equal(labels.side["0.4"], labels.cluster)


def test_other_clusterings_follow_the_labels() -> None:
    labels, _ = problem([0, 0, 1, 1], [0, 0, -1, 2])
    wide = labels.scatter(torch.tensor([3, 0, 1, 5]), 6)
    assert wide.side["0"].tolist() == [0, -1, -1, 0, -1, 2]
    assert labels.to(torch.device("cpu")).side["0"].tolist() == [0, 0, -1, 2]
    with pytest.raises(ValueError, match="side '0' must have 4 rows, got 3"):
        replace(labels, side={"0": torch.zeros(3, dtype=torch.int64)})


def test_options_are_checked() -> None:
    for wrong in ((), (0.6, 0.5), (0.5, 0.5), (0.0, 0.5)):
        with pytest.raises(ValueError, match="eps: expected numbers above 0, ascending"):
            EnsembleDBSCAN(eps=wrong)
    for options in ({"num_negatives": 0}, {"instance_weight": -1.0}):
        with pytest.raises(ValueError, match="expected num_negatives of 1 or more"):
            EnsembleLoss(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["market", "duke", "msmt"])
def test_settings_of_the_definition(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.clusterer == {
        "name": "EnsembleDBSCAN", "k1": 30, "k2": 6, "eps": [0.5, 0.55, 0.6], "min_samples": 4,
    }  # fmt: skip
    assert config.criterion == [{
        "name": "EnsembleLoss", "temperature": 0.05, "momentum": 0.2, "num_negatives": 50,
    }]  # fmt: skip
    assert config.model.bn_samples_per_group == 16


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    pairs = ("MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1}",
             "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "CLUSTERER.EPS", "[0.6, 0.7, 0.8]",
             "MODEL.BN_SAMPLES_PER_GROUP", "8")  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    losses = [line["global_instance"] for line in lines if line["kind"] == "train"]
    assert losses
    assert min(losses) > 0
    stopped = train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "1")
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, _ = read_checkpoint(whole / "model_final.safetensors")
    other, _ = read_checkpoint(stopped / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
