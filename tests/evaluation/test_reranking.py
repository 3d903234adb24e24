from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reid.evaluation import reranking
from reid.evaluation.ranking import rank_distances
from reid.evaluation.reranking import rerank
from reid.neighbors import footprint as memory
from reid.structures import FeatureSet


def features(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 16, generator=generator), dim=1)


def joined(query: torch.Tensor, gallery: torch.Tensor, **options: float) -> np.ndarray:
    blocks = list(rerank(query, gallery, **options))  # type: ignore[arg-type]
    assert [start for start, _ in blocks] == list(np.cumsum([0] + [len(b) for _, b in blocks[:-1]]))
    return np.concatenate([block for _, block in blocks])


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery = features(30, 0), features(90, 1)
    whole = joined(query, gallery)
    monkeypatch.setattr(reranking, "_BLOCK_BYTES", 4 * 90 * 7)
    np.testing.assert_allclose(joined(query, gallery), whole, atol=1e-6)


def test_progress_goes_on_to_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reranking, "_BLOCK_BYTES", 4 * 90 * 7)
    done: list[tuple[int, int]] = []
    blocks = rerank(features(30, 0), features(90, 1), progress=lambda *counts: done.append(counts))
    before = [len(done) for _ in blocks]
    assert before == sorted(set(before))
    assert done == sorted(done)
    assert {total for _, total in done} == {30}
    assert done[before[0] - 1][0] < 30
    assert done[-1] == (30, 30)


def test_large_jobs_log_their_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    joined(features(30, 0), features(90, 1))
    assert not caplog.messages
    monkeypatch.setattr(memory, "_LARGE", 120)
    joined(features(30, 0), features(90, 1))
    (message,) = caplog.messages
    assert re.fullmatch("Re-ranking 120 images, about [0-9]+ MB above their features", message)


def test_lambda_of_one_keeps_the_order() -> None:
    query, gallery = features(10, 0), features(50, 1)
    plain = torch.cdist(query, gallery).argsort(1).numpy()
    assert np.array_equal(joined(query, gallery, lambda_value=1.0).argsort(1), plain)


def test_any_scale_of_features_gives_the_same_distances() -> None:
    query, gallery = features(10, 0), features(50, 1)
    whole = joined(query, gallery)
    for scale in (2.0**63, 2.0**-83):
        np.testing.assert_array_equal(joined(query * scale, gallery * scale), whole)


def test_sets_smaller_than_the_lists() -> None:
    assert joined(features(2, 0), features(3, 1)).shape == (2, 3)


@pytest.mark.parametrize(
    ("gallery", "options", "message"),
    [
        (features(3, 1), {"lambda_value": 1.5}, "lambda from 0 to 1"),
        (features(3, 1), {"k1": 0}, "expected k1 and k2 of 1 or more"),
        (features(3, 1)[:, :5], {}, r"gallery_feat: expected \(G, 16\)"),
        (features(3, 1) * torch.nan, {}, "gallery_feat: expected finite"),
        (features(0, 1), {}, "gallery_feat: expected one image or more"),
    ],
)
def test_errors_come_before_the_first_block(
    gallery: torch.Tensor, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rerank(features(2, 0), gallery, **options)  # type: ignore[arg-type]


@pytest.mark.oracle
def test_distances_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("evaluation_*.npz"))
    assert files
    for path in files:
        a = np.load(path)
        query, gallery = (
            torch.from_numpy(a[f"{name}_feature"]).float() for name in ("query", "gallery")
        )
        found = joined(query, gallery)
        np.testing.assert_allclose(found, a["reranked_distance"], atol=1e-5, err_msg=str(path))
        sets = [
            FeatureSet.of(
                images,
                torch.from_numpy(a[f"{split}_pid"]).long(),
                torch.from_numpy(a[f"{split}_camid"]).long(),
            )
            for split, images in (("query", query), ("gallery", gallery))
        ]
        result = rank_distances([(0, found)], *sets, max_rank=len(a["reranked_cmc"]))
        assert result.mAP == pytest.approx(float(a["reranked_mAP"]), abs=1e-6)
        np.testing.assert_allclose(result.cmc, a["reranked_cmc"], atol=1e-6)
