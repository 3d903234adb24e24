"""Figures and their intervals, against what is known or was simulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reid.evaluation.evaluators import Market1501Evaluator
from reid.structures import FeatureSet
from reid.workflows.review.figures import (
    FEWEST,
    bootstrap,
    labelled_figures,
    random_figures,
    share,
)
from reid.workflows.review.similarity import SameProbability


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_a_share_has_wilsons_interval(hits: int, total: int, low: float, high: float) -> None:
    """81 of 263 and 15 of 148: Newcombe, Statistics in Medicine 1998, table I."""
    found = share(hits, total)
    assert found.low == pytest.approx(low, abs=6e-5)
    assert found.high == pytest.approx(high, abs=6e-5)
    assert found.value == hits / total


def test_few_have_no_interval() -> None:
    assert share(3, FEWEST - 1).low is None
    assert share(3, FEWEST).low is not None
    values = np.linspace(0, 1, 60)
    assert bootstrap(values, np.arange(60) % (FEWEST - 1)).low is None
    assert bootstrap(values, np.arange(60) % FEWEST).low is not None
    for wrong in ((1, 0), (2, 1), (-1, 3)):
        with pytest.raises(ValueError, match="expected"):
            share(*wrong)
    with pytest.raises(ValueError, match="expected one"):
        bootstrap(np.empty(0), np.empty(0, np.int64))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Persons of different difficulty with several queries each: 95 % in 200 tries."""
    rng = np.random.default_rng(1)
    held = too_narrow = 0
    for _ in range(200):
        groups = np.repeat(np.arange(40), rng.integers(1, 6, 40))
        values = rng.beta(2, 1, 40)[groups] + rng.normal(0, 0.05, len(groups))
        found = bootstrap(values, groups)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2 / 3 <= found.high
        alone = bootstrap(values, np.arange(len(values)))
        assert alone.low is not None
        assert alone.high is not None
        too_narrow += not alone.low <= 2 / 3 <= alone.high
    assert 0.91 <= held / 200 <= 0.98
    assert too_narrow / 200 > 0.1  # as if queries of a person were independent


def test_random_samples_enclose_rank_1() -> None:
    """A population whose Rank-1 is known, of whom some have a match too far down, some none."""
    rng = np.random.default_rng(2)
    low = high = 0
    for _ in range(20):
        kind = rng.choice(4, 300, p=[0.6, 0.2, 0.1, 0.1])  # first, second, below, no match
        lists = [[k == 0, k == 1, False] for k in kind]
        found = random_figures(lists, skipped=2, junk=1)
        assert found.best_is_right is not None
        assert found.rank1 is not None
        assert (found.answered, found.skipped, found.junk) == (300, 2, 1)
        truth = float((kind == 0).mean() / (kind != 3).mean())
        low += found.best_is_right.value <= truth
        high += found.rank1.value >= truth
    assert low == high == 20
    assert random_figures([[False, True, True]]).mAP.value == pytest.approx((1 / 2 + 2 / 3) / 2)  # type: ignore[union-attr]
    nothing = random_figures([[False], []])
    assert nothing.rank1 is nothing.mAP is None
    assert random_figures([]).best_is_right is None


def test_labelled_figures_are_the_evaluators() -> None:
    rng = torch.Generator().manual_seed(0)
    pids = torch.arange(15).repeat_interleave(6)
    camids = torch.tensor([0, 1, 2]).repeat(30)
    centre = torch.randn(15, 8, generator=rng)[pids]
    test = torch.nn.functional.normalize(centre + torch.randn(90, 8, generator=rng), dim=1)
    everyone = FeatureSet.of(test, pids, camids)
    query = everyone[torch.arange(0, 90, 4)]
    paths = [f"{i}.png" for i in range(90)]
    asked = paths[::4]
    figures = {}
    for reranking in (False, True):
        evaluator = Market1501Evaluator(reranking=reranking)
        found = labelled_figures(query, everyone, asked, paths, evaluator)
        from reid.evaluation.ranking import rank

        again = evaluator.rank_again(rank(query, everyone, query_paths=asked, gallery_paths=paths))
        numbers = evaluator(again)
        assert found.mAP is not None
        assert found.rank1 is not None
        assert found.mAP.value == pytest.approx(numbers["mAP"], abs=1e-12)
        assert found.rank1.value == pytest.approx(numbers["Rank-1"], abs=1e-12)
        assert found.persons == 15
        figures[reranking] = found.mAP.value
    assert figures[True] != figures[False]
    none = labelled_figures(everyone[:0], everyone, [], paths, Market1501Evaluator())
    assert "two cameras" in none.why


def test_likeness_follows_the_answers() -> None:
    inside, between = np.linspace(0.6, 0.9, 50), np.linspace(0.2, 0.5, 50)
    before = SameProbability(inside, between)
    values = np.array([0.3, 0.55, 0.8])
    assert (np.diff(before(values)) > 0).all()
    assert before.even == pytest.approx(0.55, abs=0.02)
    assert before(np.array([before.even]))[0] == pytest.approx(0.5)
    judged = np.linspace(0.5, 0.9, 60)
    after = SameProbability(inside, between, judged.tolist(), (judged > 0.7).tolist())
    assert after(np.array([0.6]))[0] < before(np.array([0.6]))[0]
    assert before.even < after.even < 0.75
    nothing = SameProbability(np.empty(0), np.empty(0))
    assert nothing(np.array([0.0]))[0] == 0.5
