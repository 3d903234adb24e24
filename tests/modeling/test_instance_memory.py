"""Instance memories: rows of images and source classes, scores of labels, fixed updates."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reid.modeling.contrastive import floored_log_softmax
from reid.modeling.memories import ProxyMemory
from reid.modeling.memory_losses import InstanceLoss
from reid.structures import FeatureSet, PseudoLabels


def features_of(count: int, domains: list[int] | None = None) -> FeatureSet:
    banks = torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(banks, dim=2)
    domain = None if domains is None else torch.tensor(domains)
    return FeatureSet.of(unit[:, 0], unit=unit, domains=domain)


def test_a_label_scores_the_mean_of_its_rows() -> None:
    features = features_of(7)
    cluster = torch.tensor([1, 0, -1, 1, 2, 1, 0])
    loss = InstanceLoss(0.05, 0.2, 0.1)
    loss.set_labels(PseudoLabels.from_clusters(cluster), features)
    assert loss.memory.rows.shape == (3, 7, 8)
    similarity = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    means = loss.label_means(similarity, loss.row_label)
    for label in range(3):
        expected = similarity[:, cluster == label].mean(1)
        torch.testing.assert_close(means[:, :, label], expected)


def test_a_memory_that_lasts_takes_other_labels_but_no_other_features() -> None:
    loss = InstanceLoss(0.05, 0.2, 0.1)
    assert loss.kept_features() is None
    loss.set_labels(PseudoLabels.from_clusters(torch.tensor([0, 0, 1, -1])), features_of(4))
    before = loss.memory.rows.clone()
    assert not loss.needs_features
    loss.set_labels(PseudoLabels.from_clusters(torch.tensor([0, 1, 1, 1])), features_of(4))
    assert torch.equal(loss.memory.rows, before)
    assert loss.row.tolist() == [0, 1, 2, 3]  # the fourth has had its row from the start
    assert bool(before[:, 3].any())
    assert loss.row_label.tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="the memory is of 4 images, but the labels are of 3"):
        loss.set_labels(PseudoLabels.from_clusters(torch.tensor([0, 1, 1])), None)


def test_a_memory_of_an_epoch_is_filled_again() -> None:
    loss = InstanceLoss(0.05, 0.2, 0.1, fill="epoch")
    labels = PseudoLabels.from_clusters(torch.tensor([0, 0, 1]))
    loss.set_labels(labels, features_of(3))
    loss.memory.rows.zero_()
    assert loss.kept_features() is None
    assert loss.memory_state() == {}
    with pytest.raises(ValueError, match="needs the features"):
        loss.set_labels(labels, None)
    loss.set_labels(labels, features_of(3))
    assert bool(loss.memory.rows.any())
    loss.check_memory_state({}, 3)
    with pytest.raises(ValueError, match="expected nothing, got rows"):
        loss.check_memory_state({"rows": loss.memory.rows}, 3)


def test_classes_of_source_domains_share_the_first_rows() -> None:
    features = features_of(6, [1, 0, 0, 1, 0, 1])
    labels = PseudoLabels.from_clusters(torch.tensor([2, 1, 0, -1, 1, 2]))
    loss = InstanceLoss(0.05, 0.2, 0.1, source_domains=1)
    loss.set_labels(labels, features)
    assert loss.source_classes == 2
    assert loss.image_row.tolist() == [2, 1, 0, 3, 1, 4]
    assert loss.row.tolist() == [2, 1, 0, -1, 1, 4]
    assert loss.row_label.tolist() == [0, 1, 2, -1, 2]
    mean = F.normalize(features.unit[[1, 4]].mean(0), dim=1)
    torch.testing.assert_close(loss.memory.rows[:, 1], mean)
    wrong = PseudoLabels.from_clusters(torch.tensor([0, 1, 2, -1, 1, 0]))
    with pytest.raises(ValueError, match="labels of the source domains to come first"):
        InstanceLoss(0.05, 0.2, 0.1, source_domains=1).set_labels(wrong, features)
    missing = PseudoLabels.from_clusters(torch.tensor([1, 0, -1, -1, 0, 1]))  # no identity
    loss = InstanceLoss(0.05, 0.2, 0.1, source_domains=1)
    loss.set_labels(missing, features)
    assert loss.source_classes == 1
    assert loss.image_row.tolist() == [1, 0, -1, 2, 0, 3]
    assert loss.row.tolist() == [1, 0, -1, -1, 0, 3]


def test_a_fixed_memory_does_not_move() -> None:
    memory = ProxyMemory(0.2, "fixed")
    features = features_of(4)
    memory.reset(torch.arange(4), 4, features)
    before = memory.rows.clone()
    memory.update(torch.tensor([0, 1]), features.unit[2:].transpose(0, 1))
    assert torch.equal(memory.rows, before)
    with pytest.raises(ValueError, match="fill: expected epoch or once"):
        ProxyMemory(0.2, fill="never")  # type: ignore[arg-type]


def test_the_floored_softmax_is_its_definition_and_never_overflows() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 15.0):
        logits = scale * torch.randn(4, 9, generator=generator, dtype=torch.float64)
        p = logits.exp() / (logits.exp().sum(1, keepdim=True) + 1e-6)
        torch.testing.assert_close(floored_log_softmax(logits), (p + 1e-6).log())
    large = torch.tensor([[500.0, 0.0], [-500.0, -500.0]], requires_grad=True)
    value = floored_log_softmax(large)
    value.sum().backward()
    torch.testing.assert_close(
        value[0].detach(), torch.tensor([1e-6, -13.8155]), rtol=1e-4, atol=2e-6
    )
    assert bool(torch.isfinite(large.grad).all())  # type: ignore[arg-type]
