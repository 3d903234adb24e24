from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.losses import (
    STUDENT,
    Criterion,
    CrossEntropy,
    Loss,
    Triplet,
    smoothed_cross_entropy,
)
from reid.modeling.triplets import batch_hard_triplet, hardest_distances
from reid.structures import Batch, Embeddings, PseudoLabels


def as_batch(index: list[int]) -> Batch:
    rows = torch.tensor(index)
    return Batch.of(torch.zeros(len(rows), 3, 1, 1), index=rows)


def as_embeddings(feature: Tensor) -> Embeddings:
    bank, unit = feature[:, None], F.normalize(feature, dim=1)
    return Embeddings(bank, bank, unit[:, None], unit)


@pytest.mark.oracle
def test_triplet_and_cross_entropy_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("triplet_*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
        for step in range(3):
            b = {n.split(".", 1)[1]: v for n, v in a.items() if n.startswith(f"step{step}.")}
            label = b["label"].long()
            positive, negative, valid = hardest_distances(b["feature"], label)
            alone = (label[:, None] == label).sum(1) == 1
            assert bool(valid.all())
            for rows, atol in ((alone, 1e-3), (~alone, 1e-5)):
                torch.testing.assert_close(positive[rows], b["dist_ap"][rows], atol=atol, rtol=1e-5)
            torch.testing.assert_close(negative, b["dist_an"], atol=1e-5, rtol=1e-5)
            for name, margin, unit in (("soft", None, False), ("margin", float(a["margin"]), False),
                                       ("soft_unit", None, True)):  # fmt: skip
                if f"{name}_loss" not in b:
                    continue
                feature = b["feature"].clone().requires_grad_()
                taken = F.normalize(feature, dim=1) if unit else feature
                loss = batch_hard_triplet(taken, label, margin)
                loss.backward()
                assert loss.item() == pytest.approx(float(b[f"{name}_loss"]), rel=1e-4), path
                # an image alone with its label has only a rounding error as distance to itself
                torch.testing.assert_close(
                    feature.grad, b[f"{name}_grad"], atol=1e-5, rtol=1e-4, msg=f"{path} {name}"
                )
            epsilon = float(a["epsilon"])
            for name, smoothing, true_class in (("ce", 0.0, True), ("smooth", epsilon, True),
                                                ("smooth_bot", epsilon, False)):  # fmt: skip
                logit = b["logit"].clone().requires_grad_()
                loss = smoothed_cross_entropy(logit, label, smoothing, smooth_true_class=true_class)
                loss.backward()
                assert loss.item() == pytest.approx(float(b[f"{name}_loss"]), rel=1e-4), path
                torch.testing.assert_close(logit.grad, b[f"{name}_logit_grad"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("true_class", [True, False])
def test_outliers_are_left_out_of_cross_entropy(true_class: bool) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    both = smoothed_cross_entropy(
        logits, torch.tensor([0, -1, 2, -1]), 0.1, smooth_true_class=true_class
    )
    kept = smoothed_cross_entropy(
        logits[[0, 2]], torch.tensor([0, 2]), 0.1, smooth_true_class=true_class
    )
    torch.testing.assert_close(both, kept)
    none = smoothed_cross_entropy(logits, torch.full((4,), -1), smooth_true_class=true_class)
    assert float(none) == 0


def test_smoothing_of_fast_reid_divides_by_the_losses_that_are_not_zero() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    target = torch.tensor([0, 1, -1])
    lost = float(F.cross_entropy(logits[1:2], target[1:2]))  # the first row's is exactly 0
    for true_class, count in ((False, 1), (True, 2)):
        loss = smoothed_cross_entropy(logits, target, smooth_true_class=true_class)
        assert float(loss) == pytest.approx(lost / count)
    sure = smoothed_cross_entropy(logits[:1], target[:1], smooth_true_class=False)
    assert float(sure) == 0


@pytest.mark.parametrize("std", [0.01, 0.001])
def test_classifier_starts_with_the_published_spread(std: float) -> None:
    torch.manual_seed(0)
    weight = CrossEntropy(embed_dim=256, num_classes=100, init_std=std).classifier.weight.detach()
    assert float(weight.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(weight.mean())) < 0.02 * std
    with pytest.raises(ValueError, match="init_std: expected a number above 0, got 0"):
        CrossEntropy(embed_dim=4, num_classes=2, init_std=0.0)


def test_triplet_uses_the_given_feature() -> None:
    raw, normal = (torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    unit = F.normalize(normal, dim=1)
    embeddings = Embeddings(raw[:, None], normal[:, None], unit[:, None], unit)
    labels = PseudoLabels.from_clusters(torch.tensor([0, 0, 1, 1]))
    for options, expected in (
        ({}, raw),
        ({"normalize": True}, F.normalize(raw, dim=1)),
        ({"feature": "after"}, normal),
    ):
        for margin in (None, 0.3):
            loss = Triplet(margin, **options)
            loss.set_labels(labels, None)
            found = loss(embeddings, as_batch([0, 1, 2, 3]))["triplet"]
            torch.testing.assert_close(found, batch_hard_triplet(expected, labels.cluster, margin))


def test_distances_are_in_float32_under_mixed_precision() -> None:
    feature = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) + 100
    label = torch.arange(8) // 2
    with torch.autocast("cpu", torch.bfloat16):
        found = hardest_distances(feature, label)
    for one, other in zip(found, hardest_distances(feature, label), strict=True):
        assert torch.equal(one, other)


def test_a_batch_of_uneven_identities() -> None:
    """One image of an identity is its own farthest positive, at a distance of about 0."""
    feature = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([3, 5, 5, 5, 8, 8])
    by_hand = torch.cdist(feature.double(), feature.double())
    positive, negative, valid = hardest_distances(feature, label)
    assert bool(valid.all())
    for row in range(6):
        same = label == label[row]
        expected = float(by_hand[row][same].max()), float(by_hand[row][~same].min())
        found = float(positive[row]), float(negative[row])
        assert found == pytest.approx(expected, abs=1e-3)
    batch_hard_triplet(feature.requires_grad_(), label).backward()
    assert bool(torch.isfinite(feature.grad).all())


def test_triplet_leaves_out_outliers_and_needs_a_negative() -> None:
    feature = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.tensor([0, 0, 1, 1, -1, -1])
    torch.testing.assert_close(
        batch_hard_triplet(feature, label, 0.3), batch_hard_triplet(feature[:4], label[:4], 0.3)
    )
    for single in (torch.zeros(6, dtype=torch.int64), torch.full((6,), -1)):
        loss = batch_hard_triplet(feature, single)
        loss.backward()
        assert loss.item() == 0
        assert bool((feature.grad == 0).all())


def test_cross_entropy_takes_the_identities() -> None:
    loss = CrossEntropy(embed_dim=4, num_classes=2)
    loss.set_labels(PseudoLabels.from_clusters(torch.tensor([0, 1, -1])), None)
    found = loss(as_embeddings(torch.randn(2, 4)), as_batch([1, 2]))
    assert list(found) == ["cross_entropy"]
    assert loss.classifier.bias is None
    with pytest.raises(ValueError, match="expected 2 classes, got 3"):
        loss.set_labels(PseudoLabels.from_clusters(torch.tensor([0, 1, 2])), None)
    with pytest.raises(ValueError, match="needs two identities or more, got 0"):
        CrossEntropy(embed_dim=4, num_classes=0)
    with pytest.raises(ValueError, match="smoothing"):
        CrossEntropy(embed_dim=4, num_classes=2, smoothing=1.0)


def test_criterion_weighs_and_names() -> None:
    labels = PseudoLabels.from_clusters(torch.tensor([0, 0, 1, 1]))
    embeddings, batch = as_embeddings(torch.randn(4, 8)), as_batch([0, 1, 2, 3])
    given = {STUDENT: embeddings}
    one = Criterion([Triplet(margin=0.3)])
    two = Criterion([Triplet(margin=0.3)], [2.0])
    for criterion in (one, two):
        criterion.set_labels(labels, None)
        assert not criterion.needs_features
    torch.testing.assert_close(2 * one(given, batch)["triplet"], two(given, batch)["triplet"])
    twice = Criterion([Triplet(), Triplet()])
    twice.set_labels(labels, None)
    with pytest.raises(ValueError, match="two losses give triplet; AS: NAME gives one"):
        twice(given, batch)
    named = Criterion([Triplet(), Triplet(margin=0.3)], names=["", "hinge"])
    named.set_labels(labels, None)
    assert list(named(given, batch)) == ["triplet", "hinge"]
    with pytest.raises(ValueError, match="a weight and a name for each"):
        Criterion([])
    with pytest.raises(ValueError, match="margin: expected 0 or more"):
        Triplet(margin=-1.0)


class Two(Loss):
    """A loss with two values, which asks for two embeddings."""

    asks_for = (STUDENT, ("teacher", 1))

    def forward(self, student: Embeddings, teacher: Embeddings, batch: Batch) -> dict[str, Tensor]:
        return {"near": (student.test - teacher.test).square().sum(), "size": student.test.sum()}


def test_a_loss_gets_the_embeddings_that_it_asks_for_and_several_values_share_a_name() -> None:
    criterion = Criterion([Two(), Triplet(), Two()], names=["", "", "again"])
    criterion.set_labels(PseudoLabels.from_clusters(torch.tensor([0, 0, 1, 1])), None)
    assert criterion.asks_for == (STUDENT, ("teacher", 1))
    one, other = as_embeddings(torch.randn(4, 8)), as_embeddings(torch.randn(4, 8))
    values = criterion({STUDENT: one, ("teacher", 1): other}, as_batch([0, 1, 2, 3]))
    assert list(values) == ["near", "size", "triplet", "again_near", "again_size"]
    assert values["near"] == values["again_near"] == (one.test - other.test).square().sum()


@pytest.mark.parametrize(
    ("banks", "rows"), [("global", [0]), ("parts", [1, 2]), ("all", [0, 1, 2])]
)
def test_losses_use_the_given_banks(banks: Any, rows: list[int]) -> None:
    feature = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    embeddings = Embeddings(feature, feature + 1, feature, feature[:, 0])
    labels = PseudoLabels.from_clusters(torch.tensor([0, 0, 1, 1]))
    batch = as_batch([0, 1, 2, 3])
    triplet = Triplet(banks=banks, num_parts=2)
    triplet.set_labels(labels, None)
    each = [batch_hard_triplet(feature[:, row], labels.cluster) for row in rows]
    torch.testing.assert_close(triplet(embeddings, batch)["triplet"], torch.stack(each).mean())
    classify = CrossEntropy(8, 2, banks=banks, num_parts=2)
    classify.set_labels(labels, None)
    layers = [layer for layer in classify.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == len(rows)
    losses = [
        F.cross_entropy(layer(feature[:, row] + 1), labels.cluster)
        for layer, row in zip(layers, rows, strict=True)
    ]
    found = classify(embeddings, batch)["cross_entropy"]
    torch.testing.assert_close(found, torch.stack(losses).mean())
    if banks != "global":
        for part in (Triplet, lambda **options: CrossEntropy(8, 2, **options)):
            with pytest.raises(ValueError, match=f"banks: {banks} needs a head with parts"):
                part(banks=banks)
