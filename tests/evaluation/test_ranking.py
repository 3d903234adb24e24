from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.evaluation import distances, ranking, watchers
from reid.evaluation.distances import distance_blocks
from reid.evaluation.evaluation import AP, Details, Evaluation, RankingResult
from reid.evaluation.ranking import (
    list_matches,
    pair_similarities,
    rank,
    rank_again,
    rank_distances,
    spread,
    top_matches,
)
from reid.evaluation.watchers import CameraPairRanks
from reid.neighbors import kernels
from reid.structures import FeatureSet

Sets = tuple[FeatureSet, FeatureSet]


def problem(num_queries: int, num_gallery: int, seed: int = 0, levels: int = 0) -> Sets:
    """Features and ids with junk, distractors and unknown cameras; few levels make ties."""
    rng = np.random.default_rng(seed)
    count = num_queries + num_gallery
    features = rng.normal(size=(count, 8)).astype(np.float32)
    if levels:
        features = np.round(features * levels / 4)
    pids, camids = rng.integers(-1, 9, count), rng.integers(-1, 4, count)
    pids[:num_queries] = np.abs(pids[:num_queries])
    both = FeatureSet.of(*(torch.from_numpy(array) for array in (features, pids, camids)))
    return both[:num_queries], both[num_queries:]


def ids(pids: list[int], camids: list[int]) -> FeatureSet:
    """Images with dummy features."""
    return FeatureSet.of(torch.zeros(len(pids), 1), torch.tensor(pids), torch.tensor(camids))


def squared(query: FeatureSet, gallery: FeatureSet) -> np.ndarray:
    found: np.ndarray = torch.cdist(query.test.double(), gallery.test.double()).square().numpy()
    return found


def left_out(query: FeatureSet, gallery: FeatureSet) -> Tensor:
    """(Q, G) whether the protocol removes the gallery image."""
    same = query.pids[:, None] == gallery.pids
    own_camera = (query.camids[:, None] == gallery.camids) & (query.camids[:, None] >= 0)
    return (gallery.pids == -1) | (same & own_camera)


def plain(
    distance: np.ndarray, query: FeatureSet, gallery: FeatureSet, ap: str = "step"
) -> tuple[list[float], list[float], list[int]]:
    """The protocol with sorted lists; of equally near images, wrong answers come first."""
    aps, inps, firsts = [], [], []
    removed = left_out(query, gallery).numpy()
    for i in range(len(distance)):
        kept = np.flatnonzero(~removed[i])
        same = gallery.pids.numpy()[kept] == int(query.pids[i])
        order = np.lexsort((same, distance[i, kept]))
        hits = np.flatnonzero(same[order])
        if not len(hits) or query.pids[i] == -1:
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
@pytest.mark.parametrize("block_bytes", [2**26, 1, 130 * 2048 * 4])
def test_ranking_is_the_protocol(
    levels: int, ap: AP, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "_BLOCK_BYTES", block_bytes)
    query, gallery = problem(150, 700, levels=levels)
    result = rank(query, gallery, ap=ap).ranking
    distance = squared(query, gallery)
    if levels:
        distance = np.round(distance)
    aps, inps, firsts = plain(distance, query, gallery, ap)
    assert result.mAP == pytest.approx(np.mean(aps), abs=1e-9)
    assert result.mINP == pytest.approx(np.mean(inps), abs=1e-9)
    for k in (1, 5, 10, 20):
        assert result.rank(k) == pytest.approx(np.mean(np.array(firsts) < k))
        assert result.cmc[k - 1] == pytest.approx(result.rank(k))
    assert (result.ties.sum() > 0) == (levels > 0)


def by_hand(pids: list[int], camids: list[int], ap: AP = "step") -> RankingResult:
    """One query of identity 1 and camera 0; the gallery's distances rise in the given order."""
    distance = np.arange(len(pids), dtype=np.float32)[None]
    return rank_distances([(0, distance)], ids([1], [0]), ids(pids, camids), ap=ap)


@pytest.mark.parametrize("levels", [0, 40])
@pytest.mark.parametrize("matches", [30, 300])
@pytest.mark.parametrize("in_front", [True, False])
def test_matches_in_front_and_behind(in_front: bool, matches: int, levels: int) -> None:
    # Images are looked up among matches that lie in front, and else rows compared with each match.
    rng = np.random.default_rng(matches)
    rows = rng.random((2, 9000)).astype(np.float32)
    gallery = ids([0] * matches + [1] * (9000 - matches), [1] * 9000)
    query = ids([0, 0], [0, 0])
    if in_front:
        rows[:, :matches] /= 200
    if levels:
        rows = np.round(rows * levels)
    found = rank_distances([(0, rows)], query, gallery)
    aps, inps, _ = plain(rows.astype(np.float64), query, gallery, "step")
    assert found.mAP == pytest.approx(np.mean(aps), abs=1e-9)
    assert found.mINP == pytest.approx(np.mean(inps), abs=1e-9)
    np.testing.assert_allclose(found.average_precision, aps, atol=1e-9)


def test_by_hand() -> None:
    # removed, junk, distractor, hit, wrong, hit  ->  wrong, hit, wrong, hit
    result = by_hand([1, -1, 0, 1, 2, 1], [0, 3, 0, 1, 0, 2])
    assert result.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert result.mINP == pytest.approx(2 / 4)
    assert (result.rank(1), result.rank(2)) == (0, 1)
    trapezoid = by_hand([1, -1, 0, 1, 2, 1], [0, 3, 0, 1, 0, 2], "trapezoid")
    assert trapezoid.mAP == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)


def test_queries_without_a_match_are_ignored() -> None:
    distance = np.array([[0, 1], [0, 1]], np.float32)
    result = rank_distances([(0, distance)], ids([1, 7], [0, 0]), ids([1, 2], [1, 1]))
    assert result.num_valid == 1
    assert np.isnan(result.average_precision[1])
    assert result.mAP == result.rank(1) == 1


def test_unreadable_images_are_ignored() -> None:
    query, gallery = problem(20, 60)
    present = torch.arange(60) % 3 > 0
    found = rank(query, replace(gallery, present=present)).ranking
    expected = rank(query, gallery[present]).ranking
    np.testing.assert_array_equal(found.average_precision, expected.average_precision)
    absent = replace(query, present=torch.arange(20) > 0)
    assert np.isnan(rank(absent, gallery).ranking.average_precision[0])


def test_an_image_is_never_its_own_match() -> None:
    """Cameras are unknown and remove nothing; only paths show that images are the same."""
    features = F.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = FeatureSet.of(features, torch.arange(30) % 6)
    query, gallery = whole[:12], whole
    paths = [f"{i}.jpg" for i in range(30)]
    details = Details(similarities=True, ranked_lists=12, list_length=30)
    found = rank(
        query, gallery, details=details,
        query_paths=[f"sub/../{path}" for path in paths[:12]], gallery_paths=paths,
    )  # fmt: skip
    distance = squared(query, gallery)
    aps = []
    for i in range(12):
        kept = np.delete(np.arange(30), i)
        aps += plain(distance[i : i + 1, kept], query[i : i + 1], gallery[torch.from_numpy(kept)])[
            0
        ]
    np.testing.assert_allclose(found.ranking.average_precision, aps)
    assert rank(query, gallery).ranking.mAP > found.ranking.mAP
    assert found.similarities is not None
    assert found.ranked_lists is not None
    assert found.similarities.matching.sum() == 12 * 4
    assert found.similarities.others.sum() == 12 * 25
    for row, kept, everything in zip(
        found.ranked_lists.queries,
        found.ranked_lists.without_junk,
        found.ranked_lists.with_junk,
        strict=True,
    ):
        assert row not in [column for column, _ in kept]
        assert everything[0] == (row, "junk")
    # one image under two identities: the gallery's copy is neither a match nor a wrong answer
    other = replace(gallery, pids=torch.where(torch.arange(30) == 0, 99, gallery.pids))
    again = rank(query[:1], other, query_paths=paths[:1], gallery_paths=paths)
    assert again.ranking.average_precision[0] == found.ranking.average_precision[0]
    with pytest.raises(ValueError, match="gallery_paths: expected 30 entries, got 12"):
        rank(query, gallery, query_paths=paths[:12], gallery_paths=paths[:12])


def test_figures_do_not_depend_on_the_order_of_the_gallery(
    caplog: pytest.LogCaptureFixture,
) -> None:
    query, gallery = problem(40, 200, levels=1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        one, other = rank(query, gallery).ranking, rank(query, gallery[order]).ranking
    np.testing.assert_array_equal(one.average_precision, other.average_precision)
    np.testing.assert_array_equal(one.first_match_rank, other.first_match_rank)
    assert len(caplog.messages) == 2  # one for each ranking
    assert "40 of 40 queries are exactly as far from one of their matches" in caplog.messages[0]


def test_equal_features_get_the_lowest_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    same = FeatureSet.of(torch.ones(1, 4).expand(101, 4), torch.arange(101) // 100 * 0 + 1)
    gallery = replace(same[:100], pids=torch.cat((torch.ones(1), torch.full((99,), 2))).long())
    with caplog.at_level(logging.WARNING):
        result = rank(same[100:], gallery).ranking
    assert result.mAP == 1 / 100
    assert result.rank(20) == 0
    assert result.ties.tolist() == [99]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("scale", [1e19, 1e-13, 1e-25, 1e-38])
def test_any_scale_of_features_gives_the_same_figures(scale: float) -> None:
    query, gallery = problem(40, 300)
    # a power of two, so that the features themselves keep every digit
    factor = 2.0 ** round(np.log2(scale))
    scaled = [replace(each, test=each.test * factor) for each in (query, gallery)]
    if scale > 1e-38:  # below, features themselves lose digits
        assert torch.equal(scaled[0].test / factor, query.test)
    found, expected = rank(*scaled).ranking, rank(query, gallery).ranking
    np.testing.assert_allclose(found.average_precision, expected.average_precision, atol=1e-3)


def test_very_many_dimensions_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery = problem(30, 300)
    wide = [replace(each, test=each.test.repeat(1, 50)) for each in (query, gallery)]
    expected = rank(*wide).ranking
    monkeypatch.setattr(distances, "_TILE_BYTES", 4 * 400 * 7)
    assert distances.tile_columns(400) == 7
    found = rank(*wide).ranking
    np.testing.assert_allclose(found.average_precision, expected.average_precision, atol=1e-6)
    shapes = {block.shape for _, block in distance_blocks(*(each.test for each in wide))}
    assert all(rows <= 7 for rows, _ in shapes)


def test_top_matches_leave_out_junk() -> None:
    query, gallery = problem(20, 60)
    found = top_matches(query, gallery, k=8)
    distance = torch.cdist(query.test, gallery.test).masked_fill(
        left_out(query, gallery), torch.inf
    )
    assert np.array_equal(found, distance.argsort(1)[:, :8].numpy())
    few = top_matches(query, gallery[:3], k=8)
    assert (few[:, 3:] == -1).all()
    with pytest.raises(ValueError, match="k: expected 1 or more, got 0"):
        top_matches(query, gallery, k=0)


def test_lists_hold_verdicts() -> None:
    query, gallery = problem(40, 60)
    lists = list_matches(query, gallery, 5, k=60)
    assert lists.queries == spread(40, 5).tolist() == [0, 9, 19, 29, 39]
    best = top_matches(query, gallery, k=60)
    removed = left_out(query, gallery)
    for row, kept, everything in zip(
        lists.queries, lists.without_junk, lists.with_junk, strict=True
    ):
        assert [column for column, _ in kept] == best[row][best[row] >= 0].tolist()
        assert len(everything) == 60
        for column, verdict in everything:
            same = gallery.pids[column] == query.pids[row]
            wanted = "junk" if removed[row, column] else "same" if same else "other"
            assert verdict == wanted
    passed = rank(query, gallery, details=Details(ranked_lists=5, list_length=60)).ranked_lists
    assert passed == lists


def test_errors() -> None:
    query, gallery = problem(4, 6)
    narrow = replace(gallery, test=gallery.test[:, :5])
    with pytest.raises(ValueError, match=r"gallery_feat: expected \(G, 8\)"):
        rank(query, narrow)
    with pytest.raises(ValueError, match="query_feat: expected finite"):
        rank(replace(query, test=query.test * torch.nan), gallery)
    with pytest.raises(ValueError, match="no query has a match: none of 6 gallery images has the"):
        rank(replace(query, pids=query.pids + 100), gallery)
    with pytest.raises(ValueError, match="max_rank: expected 1 or more"):
        rank(query, gallery, max_rank=0)
    with pytest.raises(ValueError, match="ap: expected step or trapezoid, got 'mean'"):
        rank(query, gallery, ap="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 4 queries, got 0"):
        rank_distances([], query, gallery)
    block = np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="each of 4 queries once"):
        rank_distances([(0, block), (2, block[:2])], query, gallery)


@pytest.mark.oracle
def test_numbers_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("evaluation_*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
        sets = [
            FeatureSet.of(
                a[f"{split}_feature"].float(), a[f"{split}_pid"].long(), a[f"{split}_camid"].long()
            )
            for split in ("query", "gallery")
        ]
        result = rank(*sets, max_rank=len(a["cmc"])).ranking
        assert result.mAP == pytest.approx(float(a["mAP"]), abs=1e-6), path
        np.testing.assert_allclose(result.cmc, a["cmc"], atol=1e-6, err_msg=str(path))
        assert not result.ties.any()  # so no rule for ties matters


def test_block_size_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    features = F.normalize(torch.randn(600, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = FeatureSet.of(features, torch.arange(600) % 40, torch.arange(600) % 7)
    first = rank(whole[:200], whole[200:]).ranking
    monkeypatch.setattr(distances, "_BLOCK_BYTES", 1)
    assert len([*distance_blocks(whole[:200].test, whole[200:].test)]) == 2
    other = rank(whole[:200], whole[200:]).ranking
    assert np.array_equal(first.average_precision, other.average_precision)


EVERYTHING = Details(camera_pairs=True, similarities=True, ranked_lists=7, list_length=5)


def test_compiled_code_is_called_for_few_queries_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Python answers Ctrl-C between two of these calls
    sets = problem(150, 700)
    expected = rank(*sets, details=EVERYTHING)
    most: dict[str, int] = {}

    def watched(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(start: int, stop: int, *arguments: object) -> None:
            most[name] = max(stop - start, most.get(name, 0))
            kernel(start, stop, *arguments)

        return call

    for name in ("rank_rows", "count_pairs"):
        monkeypatch.setattr(watchers, name, watched(name, getattr(watchers, name)))
    monkeypatch.setattr(kernels, "PIECE", 1)
    agree(rank(*sets, details=EVERYTHING), expected)
    assert set(most) == {"rank_rows", "count_pairs"}
    assert max(most.values()) <= numba.get_num_threads()


def agree(found: Evaluation, expected: Evaluation) -> None:
    for name in ("average_precision", "inverse_negative_penalty", "first_match_rank", "cmc"):
        np.testing.assert_array_equal(getattr(found.ranking, name), getattr(expected.ranking, name))
    for name in ("query_cameras", "gallery_cameras", "mAP"):
        np.testing.assert_array_equal(
            getattr(found.camera_pairs, name), getattr(expected.camera_pairs, name)
        )
    for name in ("matching", "others"):
        np.testing.assert_array_equal(
            getattr(found.similarities, name), getattr(expected.similarities, name)
        )
    assert found.ranked_lists == expected.ranked_lists


def test_one_pass_over_the_distances_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK_BYTES", 1)  # several blocks
    query, gallery = problem(300, 2500)
    passes: list[int] = []

    def counted(*features: Tensor) -> object:
        passes.append(1)
        return distance_blocks(*features)

    monkeypatch.setattr(ranking, "distance_blocks", counted)
    found = rank(query, gallery, details=EVERYTHING)
    assert len(passes) == 1
    for details in (Details(), Details(camera_pairs=True), Details(similarities=True)):
        alone = rank(query, gallery, details=details)
        np.testing.assert_array_equal(
            alone.ranking.average_precision, found.ranking.average_precision
        )
        assert (alone.camera_pairs is None) == (not details.camera_pairs)
        assert (alone.similarities is None) == (not details.similarities)
        assert alone.ranked_lists is None
    assert found.ranked_lists == list_matches(query, gallery, 7, k=5)
    other = pair_similarities(query, gallery)
    assert found.similarities is not None
    np.testing.assert_array_equal(found.similarities.matching, other.matching)


def test_ranked_again_by_the_same_distances() -> None:
    query, gallery = problem(150, 700)
    first = rank(query, gallery, details=EVERYTHING)
    blocks = [
        (start, block[:, :700].copy()) for start, block in distance_blocks(query.test, gallery.test)
    ]
    again = rank_again(first, blocks, ap="step", ranked_by="the same")
    agree(again, first)
    assert (first.text, again.text) == ("AP step, Euclidean distance", "AP step, the same")
    by_trapezoid = rank_again(first, blocks, ap="trapezoid", ranked_by="the same")
    expected = rank(query, gallery, ap="trapezoid", details=EVERYTHING)
    agree(by_trapezoid, expected)
    assert by_trapezoid.ranking.mAP != first.ranking.mAP


@pytest.mark.parametrize("ap", ["step", "trapezoid"])
def test_camera_pairs(ap: AP) -> None:
    query, gallery = problem(80, 400)
    pairs = rank(query, gallery, ap=ap, details=Details(camera_pairs=True)).camera_pairs
    assert pairs is not None
    rows, columns = pairs.query_cameras.tolist(), pairs.gallery_cameras.tolist()
    assert rows == columns == [-1, 0, 1, 2, 3]
    for i, from_camera in enumerate(rows):
        for j, to_camera in enumerate(columns):
            asked, inside = query[query.camids == from_camera], gallery[gallery.camids == to_camera]
            aps, *_ = plain(squared(asked, inside), asked, inside, ap)
            if aps:
                assert pairs.mAP[i, j] == pytest.approx(np.mean(aps), abs=1e-9)
            assert np.isnan(pairs.mAP[i, j]) == (not aps)
    assert np.isnan(pairs.mAP[rows.index(2), columns.index(2)])


def test_camera_pairs_of_too_many_cameras_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CameraPairRanks, "MOST_CAMERAS", 4)
    with caplog.at_level(logging.WARNING):
        found = rank(*problem(80, 400), details=Details(camera_pairs=True))
    assert found.camera_pairs is None
    (message,) = caplog.messages
    assert message == (
        "There is no table of camera pairs: 5 cameras of queries and 5 of the gallery; more than 4 "
        "make no table"
    )


def test_hardest_queries() -> None:
    result = rank(*problem(60, 300)).ranking
    found = result.hardest(5)
    assert len(found) == 5
    worst = np.sort(result.average_precision[~np.isnan(result.average_precision)])[:5]
    np.testing.assert_array_equal(result.average_precision[found], worst)


def test_true_positive_rates() -> None:
    query, gallery = problem(60, 500)
    rates = (0.0, 0.01, 0.1, 1.0)
    pairs = pair_similarities(query, gallery)
    found = pairs.true_positive_rates(rates)
    distance = torch.cdist(query.test.double(), gallery.test.double()).square()
    same = query.pids[:, None] == gallery.pids
    kept = ~left_out(query, gallery)
    right, wrong = distance[kept & same], distance[kept & ~same].sort().values
    for rate, value in zip(rates, found, strict=True):
        allowed = int(rate * len(wrong))
        threshold = wrong[allowed] if allowed < len(wrong) else torch.inf
        assert value == pytest.approx(float((right < threshold).double().mean()), abs=2e-3)
    assert found[-1] == 1
    with pytest.raises(ValueError, match="false_positive_rates"):
        pairs.true_positive_rates((2.0,))
    strangers = pair_similarities(replace(query, pids=query.pids + 100), gallery)
    with pytest.raises(
        ValueError, match="pairs of the same person and of different persons, got 0"
    ):
        strangers.true_positive_rates(rates)
    with pytest.raises(ValueError, match="persons, got 0 and 0"):
        pair_similarities(query[:0], gallery).true_positive_rates(rates)


def test_similarities_by_hand() -> None:
    """Cosines 1 and 0 are matches, -1 is not; junk and the query's camera are ignored."""
    query = FeatureSet.of(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([0]))
    gallery = FeatureSet.of(
        torch.tensor([[1.0, 0], [0, 1], [-1, 0], [1, 0], [1, 0]]),
        torch.tensor([1, 1, 2, 1, -1]),
        torch.tensor([1, 2, 0, 0, 3]),
    )
    matching, others, edges = pair_similarities(query, gallery).histogram(4)
    assert matching.tolist() == [0, 0, 1, 1]
    assert others.tolist() == [1, 0, 0, 0]
    assert edges.tolist() == [-1, -0.5, 0, 0.5, 1]
    with pytest.raises(ValueError, match="bins: expected 1 or more"):
        pair_similarities(query, gallery).histogram(0)


def test_similarities_of_every_pair_once() -> None:
    generator = torch.Generator().manual_seed(0)
    query, gallery = (
        replace(each, test=F.normalize(torch.randn(len(each), 8, generator=generator), dim=1))
        for each in problem(200, 300)
    )
    matching, others, edges = pair_similarities(query, gallery).histogram(20)
    cosine = (query.test @ gallery.test.T).numpy()
    same, kept = query.pids[:, None] == gallery.pids, ~left_out(query, gallery)
    for counts, chosen in ((matching, kept & same), (others, kept & ~same)):
        expected, _ = np.histogram(cosine[chosen.numpy()], edges)
        assert counts.sum() == expected.sum()
        assert np.abs(counts - expected).max() <= 1
