from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reid.evaluation.evaluators import Market1501Evaluator
from reid.evaluation.reranking import expand_queries
from reid.structures import FeatureSet


@pytest.fixture
def sets() -> tuple[FeatureSet, FeatureSet]:
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(120) % 20
    centres = torch.randn(20, 16, generator=generator)
    features = F.normalize(centres[pids] + torch.randn(120, 16, generator=generator), dim=1)
    whole = FeatureSet(features, torch.zeros(120, 0, 16), pids, torch.arange(120) // 20)
    return whole[:40], whole[40:]


def test_numbers_in_the_order_of_a_table(sets: tuple[FeatureSet, FeatureSet]) -> None:
    done: list[tuple[int, int]] = []
    numbers = Market1501Evaluator()(*sets, progress=lambda *counts: done.append(counts))
    assert list(numbers) == ["mAP", "mINP", "Rank-1", "Rank-5", "Rank-10", "Rank-20"]
    assert 0 < numbers["mINP"] < numbers["mAP"] < 1
    assert numbers["Rank-1"] <= numbers["Rank-5"] <= numbers["Rank-20"]
    assert done[-1] == (40, 40)


def test_reranking_helps_here(sets: tuple[FeatureSet, FeatureSet]) -> None:
    plain = Market1501Evaluator()(*sets)
    done: list[tuple[int, int]] = []
    reranked = Market1501Evaluator(reranking=True, k1=8, k2=3)(
        *sets, progress=lambda *counts: done.append(counts)
    )
    assert done[-1] == (40, 40)
    assert reranked["mAP"] > plain["mAP"]


def test_query_expansion_helps_here(sets: tuple[FeatureSet, FeatureSet]) -> None:
    plain = Market1501Evaluator()(*sets)
    assert Market1501Evaluator(query_expansion=2)(*sets)["mAP"] > plain["mAP"]
    assert Market1501Evaluator(query_expansion=3, alpha=3.0)(*sets)["mAP"] > plain["mAP"]
    assert Market1501Evaluator(query_expansion=1000)(*sets)["mAP"] < plain["mAP"]
    with pytest.raises(ValueError, match="query_expansion and alpha of 0 or more"):
        Market1501Evaluator(query_expansion=-1)
    with pytest.raises(ValueError, match="query_expansion and alpha of 0 or more"):
        Market1501Evaluator(query_expansion=1, alpha=float("nan"))


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
