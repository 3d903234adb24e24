"""SpCL: the published numbers, data on which the published code fails, whole runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.config import load_config
from reid.data.samplers import Draw
from reid.labelling import cluster_statistics
from reid.modeling.weights import read_checkpoint
from reid.neighbors import dbscan, jaccard_distance
from reid.projects.spcl import MultiGallerySampler, SelfPacedDBSCAN, SpCLLoss
from reid.projects.spcl.reliability import self_paced_labels
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"


def close(found: Tensor, expected: Tensor, error: float, what: str) -> None:
    """Requires two arrays to differ by at most a share of the largest entry."""
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= error * largest, what


def step(loss: SpCLLoss, index: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient; then the memory moves."""
    f = feature.double().requires_grad_()
    seen = Embeddings(f[:, None], f[:, None], f[:, None], f), Batch.of(f, index=index)
    value = loss(*seen)["global_contrast"]
    value.backward()
    loss.commit(*seen)
    assert f.grad is not None
    return value.detach(), f.grad


def load(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


@pytest.mark.oracle
def test_losses_gradients_and_memory_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(path for path in oracle_dir.glob("spcl_*.npz") if "memory" in np.load(path))
    assert len(files) >= 2
    for path in files:
        a = load(path)
        for gradient in ("published", "exact"):
            memory, sources = a["memory"].double(), int(a.get("num_source_class", 0))
            labels = PseudoLabels.from_clusters(a["label"].long())
            domains = (torch.arange(len(memory)) >= sources).long()
            loss = SpCLLoss(
                float(a["temperature"]), float(a["momentum"]), source_domains=1 if sources else 0,
                source_gradient=gradient,  # type: ignore[arg-type]
            )  # fmt: skip
            loss.set_labels(labels, FeatureSet.of(memory, domains=domains))
            assert loss.source_classes == sources
            for number in range(3):
                s = {k[6:]: v for k, v in a.items() if k.startswith(f"step{number}.")}
                index, feature = s["index"].long() + sources, s["feature"]
                expected, grad = s["loss" if not sources else "target_loss"], s["grad"]
                if sources:
                    index = torch.cat((s["source_label"].long(), index))
                    feature = torch.cat((s["source_feature"], feature))
                    expected = expected + s["source_loss"]
                    name = "source_grad_published" if gradient == "published" else "source_grad"
                    grad = torch.cat((s[name], grad))
                value, found = step(loss, index, feature)
                what = f"{path.name} {gradient} step {number}"
                close(value, expected, 1e-5, what)
                half = len(s["grad"])
                close(found[-half:], grad[-half:], 1e-5, what)
                close(found[:half], grad[:half], 1e-5, what)
                close(loss.memory.rows[0], s["memory_after"], 1e-6, what)


@pytest.mark.oracle
def test_self_paced_labels_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("spcl_reliability*.npz"))
    assert files
    for path in files:
        a = load(path)
        eps, gap = float(a["eps"]), float(a["eps_gap"])
        k1, k2, samples = (int(a[name]) for name in ("k1", "k2", "min_samples"))
        clusterer = SelfPacedDBSCAN(k1, eps, gap, k2=k2, min_samples=samples)
        threshold = None
        for epoch in range(2):
            s = {k[7:]: v for k, v in a.items() if k.startswith(f"epoch{epoch}.")}
            graph = jaccard_distance(s["feature"].float(), k1, k2)
            dense = np.ones(graph.shape, np.float32)
            entries = graph.tocoo()  # zeros are stored too
            dense[entries.row, entries.col] = entries.data
            np.testing.assert_allclose(dense, s["jaccard"].numpy(), atol=1e-5)
            runs = []
            for name, at in (("dbscan", eps), ("dbscan_tight", eps - gap),
                             ("dbscan_loose", eps + gap)):  # fmt: skip
                run = torch.from_numpy(dbscan(graph, at, samples))
                assert torch.equal(run, s[name].long()), name
                lost = run == -1
                run[lost] = torch.arange(int(lost.sum())) + int(run.max()) + 1
                runs.append(run)
            tested = self_paced_labels(*runs, threshold)
            threshold = tested.threshold
            for name, found in (
                ("image_r_comp", tested.image_compactness),
                ("image_r_indep", tested.image_independence),
                ("label_r_comp", tested.label_compactness),
                ("label_r_indep", tested.label_independence),
                ("threshold", torch.tensor(threshold)),
            ):
                expected = a[name] if name == "threshold" else s[name]
                np.testing.assert_allclose(found, expected.double(), atol=1e-6, err_msg=name)
            assert torch.equal(tested.label, s["label"].long())
            assert torch.equal(clusterer.clusters(FeatureSet.of(s["feature"])), tested.label)


def test_the_scores_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = F.normalize(torch.randn(8, 6, generator=generator), dim=1)
    label = torch.tensor([0, 0, 1, 2, 2, 2, -1, 3])
    loss = SpCLLoss()
    loss.set_labels(PseudoLabels.from_clusters(label), FeatureSet.of(feature))
    index = torch.tensor([0, 3, 6, 7])  # the third is an outlier
    given = F.normalize(torch.randn(4, 6, generator=generator), dim=1)
    expected = []
    for f, y in zip(given, label[index].tolist(), strict=True):
        exp = torch.stack([(feature[label == k] @ f).mean() / 0.05 for k in range(4)]).exp()
        if y >= 0:
            expected.append(-(exp[y] / (exp.sum() + 1e-6) + 1e-6).log())
    seen = Embeddings(given[:, None], given[:, None], given[:, None], given)
    found = loss(seen, Batch.of(given, index=index))["global_contrast"]
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_source_and_target_samples_of_different_number() -> None:
    feature = F.normalize(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = PseudoLabels.from_clusters(torch.tensor([0, 0, 1, 2, 2, 3, 3, 3, -1]))
    domains = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1])
    values = []
    for index in ([0, 2, 1, 3, 8], [0, 2, 1], [3, 8]):
        loss = SpCLLoss(source_domains=1)
        loss.set_labels(labels, FeatureSet.of(feature.double(), domains=domains))
        values.append(step(loss, torch.tensor(index), feature[index])[0])
    torch.testing.assert_close(values[0], values[1] + values[2])


def test_half_precision_does_not_overflow() -> None:
    feature = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    loss = SpCLLoss(temperature=0.001)
    loss.set_labels(PseudoLabels.from_clusters(torch.arange(6) // 2), FeatureSet.of(feature))
    half = feature.half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        seen = Embeddings(half[:, None], half[:, None], half[:, None], half)
        value = loss(seen, Batch.of(half, index=torch.arange(6)))["global_contrast"]
    value.backward()
    assert value.dtype == torch.float32
    assert half.grad is not None
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(half.grad).all())
    assert float(value.detach()) <= 13.82


def test_all_images_left_out_in_the_first_epoch(caplog: pytest.LogCaptureFixture) -> None:
    clusterer = SelfPacedDBSCAN(k1=1, k2=1)  # nobody has a neighbour
    far = FeatureSet.of(torch.eye(8).double())
    with caplog.at_level(logging.WARNING):
        labels = clusterer(far)
    assert labels.cluster.tolist() == list(range(8))
    assert "DBSCAN left out 8 of 8 images" in caplog.text
    assert clusterer.choices == {"left_out": 8, "dissolved": 0}
    assert clusterer.state_dict() == {}
    loss = SpCLLoss()
    loss.set_labels(labels, far)
    value, gradient = step(loss, torch.arange(4), torch.eye(8)[:4])
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())
    two = scipy.sparse.csr_matrix(np.kron(np.eye(2), np.full((6, 6), 0.1)).astype(np.float32))
    assert clusterer.find_graph_clusters(two).tolist() == [0] * 6 + [1] * 6
    assert clusterer.state_dict() == {"threshold": 0.0}  # of the first epoch with a cluster


def test_theta_is_kept_and_checked() -> None:
    label, loose = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 0])
    first = self_paced_labels(label, label, label)
    assert first.threshold == 0
    later = self_paced_labels(label, label, loose, first.threshold)
    assert later.threshold == 0
    assert later.label.tolist() == [2, 3, 4, 5, 6]  # both clusters are dissolved
    assert PseudoLabels.from_clusters(later.label).num_clusters == 5
    clusterer = SelfPacedDBSCAN()
    clusterer.load_state_dict({"threshold": 0.5})
    assert clusterer.state_dict() == {"threshold": 0.5}
    with pytest.raises(ValueError, match="threshold: expected a number from 0 to 1, got 'x'"):
        clusterer.load_state_dict({"threshold": "x"})


def test_only_the_most_compact_images_stay() -> None:
    label = torch.tensor([0, 0, 0, 0])
    tight = torch.tensor([0, 0, 0, 1])
    tested = self_paced_labels(label, tight, label)
    assert tested.label.tolist() == [0, 0, 0, 1]
    assert tested.image_compactness.tolist() == [0.25, 0.25, 0.25, 0.75]


def test_the_sampler_gives_a_label_of_one_image_once() -> None:
    cluster = torch.cat((torch.arange(12) // 4, torch.arange(3, 40)))
    labels = PseudoLabels.from_clusters(cluster, torch.arange(49) % 3)
    sampler = MultiGallerySampler(16, 4, steps_per_epoch=0)
    sampler.set_labels(labels)
    assert len(sampler) == 3  # 3 labels x 4 + 37 of one image = 49
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [16, 16, 16]
    counts = torch.bincount(torch.tensor([draw.index for batch in batches for draw in batch]))
    assert int(counts[12:].max()) == 1
    by_label = torch.bincount(cluster[[draw.index for batch in batches for draw in batch]])
    assert sorted(by_label[:3].tolist())[1:] == [4, 4]  # at most one is cut at the end
    shares = []
    for rank in range(2):
        share = MultiGallerySampler(16, 4, 3, rank=rank, world_size=2)
        share.set_labels(labels)
        shares.append(list(share))
    for batch, *parts in zip(batches, *shares, strict=True):
        assert [*parts[0], *parts[1]] == batch


def test_a_pass_that_fills_no_batch_goes_on() -> None:
    sampler = MultiGallerySampler(16, 4, 2)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(5)))
    batches: list[list[Draw]] = list(islice(sampler, 2))
    assert [len(batch) for batch in batches] == [16, 16]
    assert {draw.index for draw in batches[0]} == set(range(5))


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"eps_gap: expected .* got 0\.5 with eps 0\.6"):
        SelfPacedDBSCAN(eps_gap=0.5)
    with pytest.raises(ValueError, match="source_gradient: expected published or exact"):
        SpCLLoss(source_gradient="late")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source_domains: expected 0 or more"):
        SpCLLoss(source_domains=-1)


def test_label_stage_without_large_arrays() -> None:
    # N x N would take 80 GB here
    count = 100_000
    label = torch.arange(count) // 5
    tested = self_paced_labels(label, label, label // 2)
    assert len(tested.label_compactness) == count // 5
    statistics = cluster_statistics(
        PseudoLabels.from_clusters(tested.label), torch.full((count,), -1), None, None
    )
    assert statistics["outliers"] == 0


@pytest.mark.parametrize(("name", "steps"), [("market", 400), ("duke", 400), ("msmt", 800)])
def test_published_hyper_parameters(name: str, steps: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "MultiGallerySampler", "batch_size": 64, "images_per_identity": 4,
        "steps_per_epoch": steps,
    }  # fmt: skip
    assert config.clusterer == {
        "name": "SelfPacedDBSCAN", "k1": 30, "k2": 6, "eps": 0.6, "eps_gap": 0.02,
        "min_samples": 4,
    }  # fmt: skip
    assert config.criterion == [{"name": "SpCLLoss", "temperature": 0.05, "momentum": 0.2}]
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 5e-4)
    assert (solver.max_epochs, solver.milestones, solver.warmup_epochs) == (50, [20, 40], 0)
    assert (solver.gamma, solver.amp) == (0.1, "off")
    assert config.model.backbone["last_stride"] == 1
    assert config.model.bn_samples_per_group == 16
    assert config.input.size == (256, 128)
    assert config.input.transforms[2] == {
        "name": "RandomErasing", "prob": 0.5, "area": [0.02, 0.4], "fill": "raw_mean",
    }  # fmt: skip


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    pairs = ("MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1}",
             "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "CLUSTERER.EPS_GAP", "0.1",
             "MODEL.BN_SAMPLES_PER_GROUP", "8")  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    labels = [line for line in lines if line["kind"] == "labels"]
    assert labels[0]["theta"] == labels[1]["theta"]
    assert labels[0]["outliers"] == 0
    assert labels[1]["extraction_time"] < labels[0]["extraction_time"]  # extracted once
    stopped = train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "1")
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, _ = read_checkpoint(whole / "model_final.safetensors")
    other, _ = read_checkpoint(stopped / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = [json.loads(line) for line in (stopped / "metrics.json").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert [line["loss"] for line in again if line["kind"] == "train"] == losses
