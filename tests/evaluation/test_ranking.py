from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numba
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.evaluation import ranking
from reid.evaluation.ranking import (
    RankingResult,
    camera_pair_map,
    rank,
    rank_distances,
    rank_with_camera_pairs,
    top_matches,
    true_positive_rates,
)
from reid.neighbors import kernels


def problem(
    num_queries: int, num_gallery: int, seed: int = 0, levels: int = 0
) -> tuple[Tensor, ...]:
    """Features and ids with junk, distractors and unknown cameras; few levels make ties."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_queries + num_gallery, 8)).astype(np.float32)
    if levels:
        features = np.round(features * levels / 4)
    pids = rng.integers(-1, 9, num_queries + num_gallery)
    camids = rng.integers(-1, 4, num_queries + num_gallery)
    pids[:num_queries] = np.abs(pids[:num_queries])
    both = [torch.from_numpy(array) for array in (features, pids, camids)]
    return tuple(part for a in both for part in (a[:num_queries], a[num_queries:]))


def plain(
    distance: np.ndarray, pids: tuple[Tensor, Tensor], camids: tuple[Tensor, Tensor], ap: str
) -> tuple[list[float], list[float], list[int]]:
    """The protocol, one sorted list after the other."""
    aps, inps, firsts = [], [], []
    q_pids, g_pids = (p.numpy() for p in pids)
    q_camids, g_camids = (c.numpy() for c in camids)
    for i in range(len(distance)):
        order = np.argsort(distance[i], kind="stable")
        same = g_pids[order] == q_pids[i]
        removed = (g_pids[order] == -1) | (
            same & (g_camids[order] == q_camids[i]) & (q_camids[i] >= 0)
        )
        hits = np.flatnonzero(same[~removed])
        if not len(hits) or q_pids[i] == -1:
            continue
        precision = np.arange(1, len(hits) + 1) / (hits + 1)
        if ap == "trapezoid":
            before = np.where(hits > 0, np.arange(len(hits)) / np.maximum(hits, 1), 1.0)
            precision = (precision + before) / 2
        aps.append(precision.mean())
        inps.append(len(hits) / (hits[-1] + 1))
        firsts.append(hits[0])
    return aps, inps, firsts


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("ap", ["step", "trapezoid"])
@pytest.mark.parametrize("block_size", [0, 1, 130])
def test_ranking_is_the_protocol(levels: int, ap: str, block_size: int) -> None:
    query, gallery, q_pids, g_pids, q_camids, g_camids = problem(150, 700, levels=levels)
    result = rank(
        query, gallery, q_pids, g_pids, q_camids, g_camids,
        ap=ap, block_size=block_size,  # type: ignore[arg-type]
    )  # fmt: skip
    distance = torch.cdist(query.double(), gallery.double()).square().numpy()
    if levels:
        distance = np.round(distance)
    aps, inps, firsts = plain(distance, (q_pids, g_pids), (q_camids, g_camids), ap)
    assert result.mAP == pytest.approx(np.mean(aps), abs=1e-9)
    assert result.mINP == pytest.approx(np.mean(inps), abs=1e-9)
    for k in (1, 5, 10, 20):
        assert result.rank(k) == pytest.approx(np.mean(np.array(firsts) < k))
        assert result.cmc[k - 1] == pytest.approx(result.rank(k))


def by_hand(pids: list[int], camids: list[int], ap: str = "step") -> RankingResult:
    """One query of identity 1 and camera 0; the gallery lies in the order given."""
    return rank_distances(
        [(0, np.arange(len(pids), dtype=np.float32)[None])],
        torch.tensor([1]), torch.tensor(pids), torch.tensor([0]), torch.tensor(camids),
        ap=ap,  # type: ignore[arg-type]
    )  # fmt: skip


def test_by_hand() -> None:
    # removed, junk, distractor, hit, wrong, hit  ->  wrong, hit, wrong, hit
    result = by_hand([1, -1, 0, 1, 2, 1], [0, 3, 0, 1, 0, 2])
    assert result.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert result.mINP == pytest.approx(2 / 4)
    assert (result.rank(1), result.rank(2)) == (0, 1)
    trapezoid = by_hand([1, -1, 0, 1, 2, 1], [0, 3, 0, 1, 0, 2], "trapezoid")
    assert trapezoid.mAP == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)


def test_queries_without_a_match_count_nowhere() -> None:
    distances = np.zeros((2, 2), np.float32)
    result = rank_distances(
        [(0, distances)],
        torch.tensor([1, 7]), torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([1, 1]),
    )  # fmt: skip
    assert result.num_valid == 1
    assert np.isnan(result.average_precision[1])
    assert result.mAP == result.rank(1) == 1


def test_top_matches_leave_out_what_the_protocol_removes() -> None:
    query, gallery, q_pids, g_pids, q_camids, g_camids = problem(20, 60)
    found = top_matches(query, gallery, q_pids, g_pids, q_camids, g_camids, k=8)
    distance = torch.cdist(query, gallery)
    for i in range(20):
        removed = (g_pids == -1) | (
            (g_pids == q_pids[i]) & (g_camids == q_camids[i]) & (q_camids[i] >= 0)
        )
        expected = distance[i].masked_fill(removed, torch.inf).argsort()[:8]
        assert found[i].tolist() == expected.tolist()
    kept = top_matches(
        query, gallery, q_pids, g_pids, q_camids, g_camids, k=len(gallery), keep_junk=True
    )
    assert np.array_equal(np.sort(kept, axis=1)[0], np.arange(len(gallery)))
    few = top_matches(query, gallery[:3], q_pids, g_pids[:3], q_camids, g_camids[:3], k=8)
    assert (few[:, 3:] == -1).all()


def test_errors() -> None:
    query, gallery, q_pids, g_pids, q_camids, g_camids = problem(4, 6)
    ids = (q_pids, g_pids, q_camids, g_camids)
    with pytest.raises(ValueError, match=r"gallery_feat: expected \(G, 8\)"):
        rank(query, gallery[:, :5], *ids)
    with pytest.raises(ValueError, match="query_feat: expected finite"):
        rank(query * torch.nan, gallery, *ids)
    with pytest.raises(ValueError, match="gallery_pids: expected 6 entries, got 5"):
        rank(query, gallery, q_pids, g_pids[:5], q_camids, g_camids[:5])
    with pytest.raises(ValueError, match="no query has a match"):
        rank(query, gallery, q_pids + 100, g_pids, q_camids, g_camids)
    with pytest.raises(ValueError, match="expected 4 queries, got 0"):
        rank_distances([], *ids)
    block = np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="each of 4 queries once"):
        rank_distances([(0, block), (2, block[:2])], *ids)


@pytest.mark.oracle
def test_numbers_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("evaluation_*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
        ids = tuple(
            a[name].long() for name in ("query_pid", "gallery_pid", "query_camid", "gallery_camid")
        )
        features = (a["query_feature"].float(), a["gallery_feature"].float())
        result = rank(*features, *ids, max_rank=len(a["cmc"]))
        assert result.mAP == pytest.approx(float(a["mAP"]), abs=1e-6), path
        np.testing.assert_allclose(result.cmc, a["cmc"], atol=1e-6, err_msg=str(path))


def test_block_size_does_not_change_a_bit() -> None:
    features = F.normalize(torch.randn(600, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    pids, camids = torch.arange(600) % 40, torch.arange(600) % 7
    args = (features[:100], features[100:], pids[:100], pids[100:], camids[:100], camids[100:])
    first, other = rank(*args), rank(*args, block_size=1)
    assert np.array_equal(first.average_precision, other.average_precision)


def test_compiled_code_is_called_for_few_queries_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Python answers Ctrl-C between two of these calls
    args = problem(150, 700)
    precision, rates = rank(*args).average_precision, true_positive_rates(*args)
    most: dict[str, int] = {}

    def watched(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(start: int, stop: int, *arguments: object) -> None:
            most[name] = max(stop - start, most.get(name, 0))
            kernel(start, stop, *arguments)

        return call

    for name in ("rank_rows", "count_pairs"):
        monkeypatch.setattr(ranking, name, watched(name, getattr(ranking, name)))
    monkeypatch.setattr(kernels, "PIECE", 1)
    np.testing.assert_array_equal(rank(*args).average_precision, precision)
    np.testing.assert_array_equal(true_positive_rates(*args), rates)
    assert set(most) == {"rank_rows", "count_pairs"}
    assert max(most.values()) <= numba.get_num_threads()


def test_camera_pairs() -> None:
    query, gallery, q_pids, g_pids, q_camids, g_camids = problem(80, 400)
    rows, columns, table = camera_pair_map(query, gallery, q_pids, g_pids, q_camids, g_camids)
    distance = torch.cdist(query.double(), gallery.double()).square().numpy()
    for i, from_camera in enumerate(rows):
        for j, to_camera in enumerate(columns):
            asked, inside = q_camids == int(from_camera), g_camids == int(to_camera)
            aps, *_ = plain(
                distance[asked.numpy()][:, inside.numpy()],
                (q_pids[asked], g_pids[inside]),
                (q_camids[asked], g_camids[inside]),
                "step",
            )
            if aps:
                assert table[i, j] == pytest.approx(np.mean(aps), abs=1e-9)
            else:
                assert np.isnan(table[i, j])
            assert np.isnan(table[i, j]) == (not aps)
    assert np.isnan(table[list(rows).index(2), list(columns).index(2)])


@pytest.mark.parametrize("ap", ["step", "trapezoid"])
def test_ranking_and_camera_pairs_at_once(ap: Literal["step", "trapezoid"]) -> None:
    args = problem(300, 2500)
    result, pairs = rank_with_camera_pairs(*args, ap=ap)
    np.testing.assert_array_equal(result.average_precision, rank(*args, ap=ap).average_precision)
    for found, expected in zip(pairs, camera_pair_map(*args, ap=ap), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_hardest_queries() -> None:
    result = rank(*problem(60, 300))
    found = result.hardest(5)
    assert len(found) == 5
    worst = np.sort(result.average_precision[~np.isnan(result.average_precision)])[:5]
    np.testing.assert_array_equal(result.average_precision[found], worst)


def test_true_positive_rates() -> None:
    args = problem(60, 500)
    query, gallery, q_pids, g_pids, q_camids, g_camids = args
    rates = (0.0, 0.01, 0.1, 1.0)
    found = true_positive_rates(*args, false_positive_rates=rates)
    distance = torch.cdist(query.double(), gallery.double()).square()
    same = q_pids[:, None] == g_pids
    kept = (g_pids != -1) & ~(same & (q_camids[:, None] == g_camids) & (q_camids >= 0)[:, None])
    right, wrong = distance[kept & same], distance[kept & ~same].sort().values
    for rate, value in zip(rates, found, strict=True):
        allowed = int(rate * len(wrong))
        threshold = wrong[allowed] if allowed < len(wrong) else torch.inf
        assert value == pytest.approx(float((right < threshold).double().mean()), abs=2e-3)
    assert found[-1] == 1
    with pytest.raises(ValueError, match="false_positive_rates"):
        true_positive_rates(*args, false_positive_rates=(2.0,))
    with pytest.raises(ValueError, match="expected matching and other pairs"):
        true_positive_rates(query, gallery, q_pids + 100, g_pids, q_camids, g_camids)
    with pytest.raises(ValueError, match="expected matching and other pairs, got 0 and 0"):
        true_positive_rates(query[:0], gallery, q_pids[:0], g_pids, q_camids[:0], g_camids)


def test_tiles_are_of_bounded_bytes() -> None:
    from reid.evaluation.ranking_inputs import _tile_height, distance_blocks

    assert [_tile_height(2048, dim) for dim in (1, 2048, 8192, 8193)] == [2048, 2048, 2048, 1024]
    assert [_tile_height(128, dim) for dim in (131_072, 131_073, 4_000_000, 2**40)] == [
        128,
        64,
        4,
        1,
    ]
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 200_000, generator=generator) for n in (3, 70))
    ((start, found),) = distance_blocks(query, gallery, 0)
    expected = (query[:, None] - gallery[None]).square().sum(2) - query.square().sum(1)[:, None]
    assert start == 0
    np.testing.assert_allclose(found[:, :70], expected.numpy(), rtol=1e-4)
