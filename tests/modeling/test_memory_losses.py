from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.contrastive import sample_weights
from reid.modeling.memory_losses import MemoryLoss
from reid.projects.cap import CAPLoss
from reid.projects.clustercontrast import ClusterContrastLoss
from reid.projects.o2cap import O2CAPLoss
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

NAMES = ("global_offline", "global_online", "part_offline", "part_online")


def as_embeddings(feature: Tensor) -> Embeddings:
    """Embeddings with the unit features (1 + K, B, D)."""
    banks = feature.transpose(0, 1)
    return Embeddings(banks, banks, banks, banks[:, 0])


def as_batch(index: Tensor) -> Batch:
    return Batch.of(torch.zeros(len(index), 3, 1, 1, device=index.device), index=index)


def as_feature_set(banks: Tensor, camids: Tensor) -> FeatureSet:
    """A feature set with the unit features (1 + K, N, D)."""
    return FeatureSet.of(banks[0], camids=camids, unit=banks.transpose(0, 1))


def random_problem(
    proxies_of: list[tuple[int, int]], images: int = 4, parts: int = 2, dim: int = 16
) -> tuple[PseudoLabels, FeatureSet]:
    """Images of proxies given as (cluster, camera)."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.tensor([c for c, _ in proxies_of]).repeat_interleave(images)
    camids = torch.tensor([c for _, c in proxies_of]).repeat_interleave(images)
    banks = F.normalize(torch.randn(1 + parts, len(cluster), dim, generator=generator), dim=2)
    return PseudoLabels.from_clusters(cluster, camids), as_feature_set(banks, camids)


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The equations, sample by sample; the benchmark compares with them too."""
    folder = str(Path(__file__).parents[2] / "tools" / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("losses")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(
    ("proxies_of", "what"),
    [
        ([(c, k) for c in range(9) for k in range(4)], "plenty"),
        ([(c, k) for c in range(30) for k in range(3)], "more than 50 negatives"),
        ([(c, 0) for c in range(5)], "one camera, fewer than num_positives"),
        ([(c, -1) for c in range(5)], "cameras unknown"),
        ([(0, 0), (0, 1), (0, 3)], "one cluster"),
        ([(0, 0)], "one proxy"),
        ([(0, 0), (1, 0), (1, 2), (2, 5)], "cameras without a proxy"),
    ],
)
def test_losses_are_the_definition(
    benchmark: Any, proxies_of: list[tuple[int, int]], what: str
) -> None:
    labels, features = random_problem(proxies_of)
    loss = O2CAPLoss(part_weight=0.1)
    loss.set_labels(labels, features)
    index = torch.arange(0, len(labels), 3)
    generator = torch.Generator().manual_seed(1)
    feature = F.normalize(torch.randn(3, len(index), 16, generator=generator), dim=2)
    bank = loss.memory.rows
    found = loss(as_embeddings(feature.requires_grad_()), as_batch(index))
    each = torch.tensor(
        [
            [
                benchmark.plain_losses(
                    feature[m, b].detach(), bank[m], int(labels.proxy[i]), labels
                )
                for b, i in enumerate(index.tolist())
            ]
            for m in range(3)
        ]
    ).mean(1)
    expected = [each[0, 0], each[0, 1], 0.1 * each[1:, 0].mean(), 0.1 * each[1:, 1].mean()]
    for name, value in zip(NAMES, expected, strict=True):
        assert found[name].item() == pytest.approx(float(value), rel=1e-4, abs=1e-6), (
            f"{what}: {name}"
        )
    sum(found.values()).backward()
    assert feature.grad is not None
    assert bool(torch.isfinite(feature.grad).all()), what


def test_samples_without_a_proxy_are_left_out() -> None:
    labels, features = random_problem([(c, k) for c in range(4) for k in range(2)])
    cluster = labels.cluster.clone()
    cluster[::4] = -1
    labels = PseudoLabels.from_clusters(cluster, features.camids)
    loss = O2CAPLoss().eval()
    loss.set_labels(labels, features)
    index = torch.arange(16)
    kept = index[index % 4 > 0]
    both = loss(as_embeddings(features.unit.transpose(0, 1)[:, index]), as_batch(index))
    alone = loss(as_embeddings(features.unit.transpose(0, 1)[:, kept]), as_batch(kept))
    for name in NAMES:
        torch.testing.assert_close(both[name], alone[name])
    outliers = features.unit.transpose(0, 1)[:, index[::4]].clone().requires_grad_()
    nothing = sum(loss.train()(as_embeddings(outliers), as_batch(index[::4])).values())
    assert nothing.item() == 0
    nothing.backward()
    assert bool((outliers.grad == 0).all())


def test_without_parts_there_are_two_losses() -> None:
    labels, features = random_problem([(0, 0), (1, 1)], parts=0)
    loss = O2CAPLoss()
    loss.set_labels(labels, features)
    index = torch.tensor([0, 5])
    assert list(
        loss(as_embeddings(features.unit.transpose(0, 1)[:, index]), as_batch(index))
    ) == list(NAMES[:2])


def test_memory_moves_with_the_commit_and_is_in_no_checkpoint() -> None:
    labels, features = random_problem([(0, 0), (1, 1)])
    loss = O2CAPLoss()
    loss.set_labels(labels, features)
    index = torch.tensor([0, 5, 1])
    before = loss.memory.rows.clone()
    seen = as_embeddings(features.unit.transpose(0, 1)[:, index]), as_batch(index)
    loss.train()(*seen)
    assert torch.equal(loss.memory.rows, before)
    loss.commit(*seen, taken=torch.tensor(False))
    assert torch.equal(loss.memory.rows, before)
    loss.commit(*seen)
    assert not torch.equal(loss.memory.rows, before)
    assert loss.state_dict() == {}
    assert not list(loss.parameters())


def test_mixed_precision_computes_losses_in_float32() -> None:
    labels, features = random_problem([(c, k) for c in range(4) for k in range(2)])
    loss = O2CAPLoss().eval()
    loss.set_labels(labels, features)
    index = torch.arange(8)
    plain = loss(as_embeddings(features.unit.transpose(0, 1)[:, index]), as_batch(index))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(as_embeddings(features.unit.transpose(0, 1)[:, index]), as_batch(index))
    for name in NAMES:
        assert torch.equal(plain[name], mixed[name])


def test_options_are_checked() -> None:
    for options, message in (
        ({"temperature": 0.0}, "temperature"),
        ({"momentum": 1.5}, "momentum"),
        ({"balance": -0.1}, "balance"),
        ({"part_weight": -1.0}, "part_weight"),
        ({"num_negatives": 0}, "num_negatives"),
    ):
        with pytest.raises(ValueError, match=message):
            O2CAPLoss(**options)  # type: ignore[arg-type]
    labels, _ = random_problem([(0, 0)])
    with pytest.raises(ValueError, match="needs the features"):
        O2CAPLoss().set_labels(labels, None)


@pytest.mark.oracle
def test_losses_gradients_and_memory_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("loss_*.npz"))
    assert files
    for path in files:
        a = np.load(path)
        tensors = {name: torch.from_numpy(np.asarray(a[name])) for name in a.files}
        cluster, camid = tensors["cluster_label"].long(), tensors["camid"].long()
        labels = PseudoLabels.from_clusters(cluster, camid)
        assert torch.equal(labels.proxy, tensors["proxy_label"].long()), path
        loss = O2CAPLoss(
            temperature=float(a["temperature"]),
            momentum=float(a["momentum"]),
            balance=float(a["balance"]),
            part_weight=float(a["part_weight"]),
            num_positives=int(a["pos_k"]),
            num_negatives=int(a["neg_k"]),
        )
        bank = tensors["bank"].float()
        # One image of each proxy with its entry as the feature, so that means are the entries.
        first = torch.stack([(labels.proxy == p).nonzero()[0, 0] for p in range(bank.shape[1])])
        features = torch.zeros(bank.shape[0], len(cluster), bank.shape[2])
        features[:, first] = bank
        loss.set_labels(labels, as_feature_set(features, camid))
        torch.testing.assert_close(loss.memory.rows, bank, atol=1e-6, rtol=0)
        for step in range(3):
            feature = tensors[f"step{step}.feature"].float().requires_grad_()
            index = tensors[f"step{step}.index"].long()
            found = loss(as_embeddings(feature), as_batch(index))
            expected = ("global_off_loss", "global_on_loss", "part_off_loss", "part_on_loss")
            for name, other in zip(NAMES, expected, strict=True):
                value = float(a[f"step{step}.{other}"])
                assert found[name].item() == pytest.approx(float(value), rel=1e-4), f"{path} {name}"
            total = sum(found.values())
            assert total.item() == pytest.approx(float(a[f"step{step}.loss"]), rel=1e-4)
            total.backward()
            assert feature.grad is not None
            error = (feature.grad - tensors[f"step{step}.grad"]).abs().max()
            assert error <= 1e-5, f"{path} step {step}"
            loss.commit(as_embeddings(feature.detach()), as_batch(index))
            torch.testing.assert_close(
                loss.memory.rows, tensors[f"step{step}.bank_after"].float(), atol=1e-6, rtol=0
            )


def test_the_benchmark_agrees(benchmark: Any) -> None:
    found = benchmark.steps(benchmark.make_ready(200, 3, 16))
    plain = benchmark.plain_step(benchmark.make_problem(200, 3, 16))
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    for one, other in zip(found[1:], plain[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [O2CAPLoss(average="camera"), ClusterContrastLoss(),
                                  ClusterContrastLoss(update="hard")])  # fmt: skip
def test_a_step_reads_no_number_from_the_device(
    loss: MemoryLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device `meta` has no numbers, so code that reads one on the host fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    labels, features = random_problem([(c, k) for c in range(4) for k in range(3)])
    loss.set_labels(labels, features)
    moved = loss.to("meta").train()
    feature = torch.zeros(3, 8, 16, device="meta", requires_grad=True)
    index = torch.zeros(8, dtype=torch.int64, device="meta")
    seen = as_embeddings(feature), as_batch(index.clone())
    torch.stack([*moved(*seen).values()]).sum().backward()
    assert feature.grad is not None
    moved.commit(*seen, taken=torch.zeros((), device="meta") == 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_does_not_wait_for_a_gpu() -> None:
    labels, features = random_problem([(c, k) for c in range(4) for k in range(3)])
    loss = O2CAPLoss(average="camera").train()
    loss.set_labels(labels, features)
    loss.to("cuda")
    feature = features.unit.transpose(0, 1)[:, :8].cuda().requires_grad_()
    batch = as_batch(torch.arange(8, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.stack([*loss(as_embeddings(feature), batch).values()]).sum().backward()
        loss.commit(as_embeddings(feature.detach()), batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_means_camera_by_camera() -> None:
    has_loss = torch.tensor([True, True, True, False, True])
    camera = torch.tensor([0, 0, 5, 5, 9])
    by_camera = sample_weights(has_loss, camera, "camera")
    torch.testing.assert_close(by_camera, torch.tensor([0.5, 0.5, 1, 0, 1]))
    batch = sample_weights(has_loss, camera, "batch")
    torch.testing.assert_close(batch, torch.tensor([0.25, 0.25, 0.25, 0, 0.25]))
    assert not bool(sample_weights(~torch.ones_like(has_loss), camera, "batch").any())
    with pytest.raises(ValueError, match="average: expected batch or camera, got 'sum'"):
        O2CAPLoss(average="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "cosine"),
    # O2CAP also chooses from rounded similarities, so some of nearly equal proxies change.
    [(O2CAPLoss, 0.99), (CAPLoss, 0.999), (ClusterContrastLoss, 0.999)],
)
def test_a_bf16_memory_changes_losses_and_gradients_a_little(kind: Any, cosine: float) -> None:
    labels, features = random_problem([(c, k) for c in range(20) for k in range(3)], dim=64)
    index = torch.arange(0, len(labels), 5)
    given = features.unit[index].transpose(0, 1) + 0.05
    given = F.normalize(given, dim=2)
    told, gradients = [], []
    for dtype in ("fp32", "bf16"):
        loss = kind(memory_dtype=dtype)
        loss.set_labels(labels, features)
        feature = given.clone().requires_grad_()
        total = torch.stack([*loss(as_embeddings(feature), as_batch(index)).values()]).sum()
        total.backward()
        assert feature.grad is not None
        loss.commit(as_embeddings(feature.detach()), as_batch(index))
        assert loss.memory.rows.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        told.append(float(total.detach()))
        gradients.append(feature.grad.flatten())
    # An error of 2^-9 in a product is one of 2^-9 / temperature in a logit: here 0.04 at most.
    assert 0 < abs(told[0] - told[1]) < 0.02 * told[0]
    assert float(F.cosine_similarity(*gradients, dim=0)) > cosine
