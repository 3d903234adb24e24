"""Classifiers over clusters: their rows, the optimizer's moments, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.engine.optimization import Optimization
from reid.modeling.classifiers import ClusterClassifier, Moments, fit_classifiers
from reid.solver import LearningRate, build_optimizer

CPU = torch.device("cpu")


def made(moments: Moments, name: str = "Adam") -> tuple[ClusterClassifier, Optimization]:
    """A classifier beside another parameter, both trained."""
    classifier = ClusterClassifier(4, moments)
    other = nn.Linear(4, 2)
    optimizer = build_optimizer(
        [*classifier.parameters(), *other.parameters()],
        name,
        lr=0.1,
        weight_decay=0.1,  # type: ignore[arg-type]
    )
    return classifier, Optimization(optimizer, LearningRate(0.1, 9), CPU)


def refill(classifier: ClusterClassifier, count: int, seed: int = 0) -> None:
    feature = F.normalize(torch.randn(3 * count, 4, generator=torch.Generator().manual_seed(seed)))
    classifier.refill(torch.arange(3 * count) % count, count, feature)


def step(classifier: ClusterClassifier, optimization: Optimization) -> None:
    """A step on one batch."""
    feature = torch.randn(5, 4, generator=torch.Generator().manual_seed(7))
    optimization.follow_refills(classifier)
    optimization.backward(F.cross_entropy(classifier(feature), torch.zeros(5, dtype=torch.int64)))
    optimization.step()


def moments_of(classifier: ClusterClassifier, optimization: Optimization) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in optimization.optimizer.state[classifier.weight].items()}


def test_rows_are_the_unit_means_of_the_clusters() -> None:
    classifier = ClusterClassifier(4)
    weight = classifier.weight
    feature = F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    classifier.refill(torch.tensor([1, 0, -1, 1, 1, 0, -1]), 2, feature)
    assert classifier.weight is weight, "so that the optimizer goes on training it"
    expected = torch.stack([feature[[1, 5]].mean(0), feature[[0, 3, 4]].mean(0)])
    torch.testing.assert_close(weight.detach(), F.normalize(expected, dim=1))
    assert classifier(feature).shape == (7, 2)
    refill(classifier, 5)
    assert classifier(feature).shape == (7, 5)


def test_logits_are_in_single_precision_under_autocast() -> None:
    classifier = ClusterClassifier(4)
    refill(classifier, 3)
    feature = torch.randn(6, 4)
    expected = classifier(feature)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(feature), expected)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_moments_stay_with_their_rows(name: str, count: int) -> None:
    classifier, optimization = made("keep", name)
    refill(classifier, 3)
    for _ in range(2):
        step(classifier, optimization)
    before = moments_of(classifier, optimization)
    refill(classifier, count, seed=1)
    optimization.follow_refills(classifier)
    after = moments_of(classifier, optimization)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if not value.ndim:
            assert torch.equal(after[key], value)
            continue
        assert after[key].shape == (count, 4)
        assert value.any()
        assert torch.equal(after[key][:3], value[:count])
        assert not after[key][3:].any()
    step(classifier, optimization)
    assert torch.isfinite(classifier.weight).all()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_dropped_moments_are_those_of_a_new_optimizer(name: str) -> None:
    classifier, optimization = made("drop", name)
    refill(classifier, 3)
    step(classifier, optimization)
    refill(classifier, 3, seed=1)
    step(classifier, optimization)
    fresh, new = made("drop", name)
    refill(fresh, 3, seed=1)
    step(fresh, new)
    assert torch.equal(classifier.weight, fresh.weight)
    found, expected = moments_of(classifier, optimization), moments_of(fresh, new)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_moments_are_fitted_once_for_a_refill() -> None:
    classifier, optimization = made("drop")
    refill(classifier, 3)
    for _ in range(3):
        step(classifier, optimization)
    assert float(moments_of(classifier, optimization)["step"]) == 3


def test_a_fresh_classifier_takes_its_rows_from_a_checkpoint() -> None:
    saved = nn.ModuleList([nn.Linear(4, 2), ClusterClassifier(4)])
    refill(saved[1], 6)  # type: ignore[arg-type]
    fresh = nn.ModuleList([nn.Linear(4, 2), ClusterClassifier(4)])
    weight = fresh[1].weight
    fit_classifiers(fresh, saved.state_dict())
    fresh.load_state_dict(saved.state_dict())
    assert fresh[1].weight is weight
    assert torch.equal(fresh[1].weight, saved[1].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rows", [None, 3, torch.zeros(4), torch.zeros(2, 5), torch.zeros(1, 4).expand(10**12, 4)]
)
def test_what_is_no_matrix_of_rows_changes_nothing(rows: object) -> None:
    classifier = ClusterClassifier(4)
    fit_classifiers(classifier, {"weight": rows})
    fit_classifiers(classifier, rows)
    assert classifier.weight.shape == (0, 4)
