from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reid.evaluation.evaluation import Details, Evaluation
from reid.evaluation.evaluators import Evaluator, Market1501Evaluator
from reid.evaluation.ranking import rank, rank_distances
from reid.evaluation.reranking import expand_queries, rerank
from reid.structures import FeatureSet, ProgressBar


@pytest.fixture
def plain() -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(120) % 20
    centres = torch.randn(20, 16, generator=generator)
    features = F.normalize(centres[pids] + torch.randn(120, 16, generator=generator), dim=1)
    whole = FeatureSet.of(features, pids, torch.arange(120) // 20)
    details = Details(camera_pairs=True, similarities=True, ranked_lists=3)
    return rank(whole[:40], whole[40:], details=details)


def forbid_ranking(patch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("distances are computed again")

    for name in ("rank", "rank_again"):
        patch.setattr(f"reid.evaluation.evaluators.{name}", forbidden)


def test_numbers_in_the_order_of_a_table(
    plain: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_ranking(monkeypatch)
    evaluator = Market1501Evaluator()
    numbers = evaluator(plain)
    assert list(numbers) == ["mAP", "mINP", "Rank-1", "Rank-5", "Rank-10", "Rank-20"]
    assert tuple(numbers) == evaluator.metrics
    assert 0 < numbers["mINP"] < numbers["mAP"] < 1
    assert numbers["Rank-1"] <= numbers["Rank-5"] <= numbers["Rank-20"]
    assert numbers["mAP"] == plain.ranking.mAP
    assert evaluator.rank_again(plain) is plain


def test_another_average_precision(plain: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Market1501Evaluator(ap="trapezoid")
    found = evaluator.rank_again(plain)
    expected = rank(plain.query, plain.gallery, ap="trapezoid", details=plain.details)
    np.testing.assert_array_equal(
        found.ranking.average_precision, expected.ranking.average_precision
    )
    assert found.camera_pairs is not None
    assert expected.camera_pairs is not None
    np.testing.assert_array_equal(found.camera_pairs.mAP, expected.camera_pairs.mAP)
    assert found.text == "AP trapezoid, Euclidean distance"
    forbid_ranking(monkeypatch)
    assert evaluator(expected)["mAP"] == found.ranking.mAP < plain.ranking.mAP


def test_reranking_reaches_everything_and_is_done_once(
    plain: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[int, int]] = []
    evaluator = Market1501Evaluator(reranking=True, k1=8, k2=3)
    found = evaluator.rank_again(plain, lambda *counts: done.append(counts))
    assert done[-1] == (40, 40)
    query, gallery = plain.query, plain.gallery
    blocks = rerank(query.test, gallery.test, k1=8, k2=3)
    expected = rank_distances(blocks, query, gallery)
    np.testing.assert_array_equal(found.ranking.average_precision, expected.average_precision)
    assert found.camera_pairs is not None
    assert plain.camera_pairs is not None
    assert np.nanmean(found.camera_pairs.mAP) > np.nanmean(plain.camera_pairs.mAP)
    assert found.ranked_lists is not None
    assert found.ranked_lists != plain.ranked_lists
    assert found.similarities is plain.similarities
    assert found.ranked_by == ("k-reciprocal re-ranking (k1 8, k2 3, original weight 0.3)")
    forbid_ranking(monkeypatch)
    assert evaluator(found)["mAP"] == found.ranking.mAP > plain.ranking.mAP


def test_features_before_normalisation() -> None:
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(60) % 10
    raw = (
        torch.randn(60, 8, generator=generator) + 3 * torch.randn(10, 8, generator=generator)[pids]
    )
    whole = FeatureSet.of(F.normalize(raw, dim=1), pids, torch.arange(60) // 10)
    evaluator = Market1501Evaluator(normalize=False)
    unit = rank(whole[:20], whole[20:])
    with pytest.raises(ValueError, match=r"normalize: false compares .* not at hand"):
        evaluator(unit)
    whole = replace(whole, raw=raw)
    found = evaluator.rank_again(rank(whole[:20], whole[20:]))
    expected = rank(replace(whole, test=raw)[:20], replace(whole, test=raw)[20:])
    np.testing.assert_array_equal(
        found.ranking.average_precision, expected.ranking.average_precision
    )
    assert found.ranking.mAP != unit.ranking.mAP
    assert found.gallery.test.equal(whole.test[20:])
    assert found.ranked_by == "Euclidean distance of the features before normalisation"
    assert evaluator.rank_again(found) is found
    with pytest.raises(ValueError, match="normalize: expected true with query_expansion"):
        Market1501Evaluator(normalize=False, reranking=True)


def test_query_expansion_helps_here(plain: Evaluation) -> None:
    evaluator = Market1501Evaluator(query_expansion=2)
    assert evaluator(plain)["mAP"] > plain.ranking.mAP
    again = evaluator.rank_again(plain)
    assert again.query is plain.query
    assert again.details == plain.details
    assert again.similarities is plain.similarities
    assert evaluator.rank_again(again) is again
    assert Market1501Evaluator(query_expansion=3, alpha=3.0)(plain)["mAP"] > plain.ranking.mAP
    assert Market1501Evaluator(query_expansion=1000)(plain)["mAP"] < plain.ranking.mAP
    with pytest.raises(ValueError, match="query_expansion and alpha of 0 or more"):
        Market1501Evaluator(query_expansion=-1)
    with pytest.raises(ValueError, match="query_expansion and alpha of 0 or more"):
        Market1501Evaluator(query_expansion=1, alpha=float("nan"))


def test_expansion_and_reranking_together(plain: Evaluation) -> None:
    found = Market1501Evaluator(query_expansion=2, reranking=True, k1=8, k2=3).rank_again(plain)
    assert found.ranked_by == (
        "query expansion (2 images, alpha 0) and "
        "k-reciprocal re-ranking (k1 8, k2 3, original weight 0.3)"
    )
    expanded = expand_queries(plain.query.test, plain.gallery.test, 2)
    blocks = rerank(expanded, plain.gallery.test, k1=8, k2=3)
    expected = rank_distances(blocks, plain.query, plain.gallery)
    np.testing.assert_array_equal(found.ranking.average_precision, expected.average_precision)


def test_an_evaluator_of_ones_own_needs_numbers_alone(plain: Evaluation) -> None:
    class Median(Evaluator):
        def __call__(
            self, evaluation: Evaluation, progress: ProgressBar | None = None
        ) -> dict[str, float]:
            return {"median AP": float(np.nanmedian(evaluation.ranking.average_precision))}

    own = Median()
    assert (own.ap, own.metrics) == ("step", ())
    assert own.rank_again(plain) is plain
    assert 0 < own(plain)["median AP"] < 1


def test_query_expansion_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    found = expand_queries(query, gallery, k=1)
    torch.testing.assert_close(found, F.normalize(torch.tensor([[1.6, 0.8]]), dim=1))
    weighted = expand_queries(query, gallery, k=2, alpha=2.0)
    expected = F.normalize(torch.tensor([[1 + 0.36 * 0.6, 0.36 * 0.8]]), dim=1)
    torch.testing.assert_close(weighted, expected)
    with pytest.raises(ValueError, match="k: expected 1 to the gallery's 2 images"):
        expand_queries(query, gallery, k=3)
    with pytest.raises(ValueError, match="alpha: expected 0 or more, got nan"):
        expand_queries(query, gallery, k=1, alpha=float("nan"))
    with pytest.raises(ValueError, match=r"gallery_feat: expected \(G, 2\)"):
        expand_queries(query, gallery[:, :1], k=1)
    with pytest.raises(ValueError, match="query_feat: expected finite"):
        expand_queries(query * torch.nan, gallery, k=1)


def test_ranks_are_checked() -> None:
    with pytest.raises(ValueError, match="ranks: expected one or more numbers from 1"):
        Market1501Evaluator(ranks=[0])


@pytest.mark.parametrize("option", [{"k1": 0}, {"k2": 0}, {"original_weight": 1.5}])
def test_options_of_reranking_are_checked_before_training(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="k1 and k2 of 1 or more and original_weight from 0 to 1"):
        Market1501Evaluator(reranking=True, **option)  # type: ignore[arg-type]
