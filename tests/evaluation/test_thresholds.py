"""Thresholds against a table of all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reid.evaluation.thresholds import ThresholdRow, Thresholds, measure_thresholds
from reid.structures import FeatureSet


def persons(count: int, each: int = 4, noise: float = 0.5, seed: int = 0) -> FeatureSet:
    """Unit vectors around a direction of each person, from two cameras."""
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, 16, generator=random).repeat_interleave(each, 0)
    features = F.normalize(centre + noise * torch.randn(centre.shape, generator=random))
    return FeatureSet.of(
        features, torch.arange(count).repeat_interleave(each), torch.arange(count * each) % 2
    )


def all_pairs(features: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of pairs of one person in two cameras, and of pairs of two persons."""
    cosine = (features.test.double() @ features.test.double().T).numpy()
    pids, camids = features.pids.numpy(), features.camids.numpy()
    one, other = np.triu_indices(len(pids), 1)
    labelled = (pids[one] >= 0) & (pids[other] >= 0)
    same = (pids[one] == pids[other]) & (camids[one] != camids[other]) & labelled
    different = (pids[one] != pids[other]) & labelled
    return cosine[one, other][same], cosine[one, other][different]


def test_rows_say_what_all_pairs_say() -> None:
    features = persons(40)
    found = measure_thresholds(features, features, "drawn", "pairs")
    same, different = all_pairs(features)
    assert (found.same_pairs, found.other_pairs) == (len(same), len(different))
    assert len(found.rows) > 5
    for row in found.rows:
        share = (different >= row.similarity).mean() * 1e6
        assert share <= row.false_per_million
        looser = (different >= row.similarity - 1e-4).mean() * 1e6
        assert looser >= row.false_per_million - 1e6 / len(different)  # no stricter than needed
        assert row.found == pytest.approx((same >= row.similarity).mean(), abs=2e-3)
    similarities = [row.similarity for row in found.rows]
    assert similarities == sorted(similarities, reverse=True)


def test_a_rate_needs_ten_false_matches() -> None:
    features = persons(40)  # 12,480 pairs of two persons
    found = measure_thresholds(features, features, "drawn", "pairs")
    assert found.rows[0].false_per_million == 1000
    with pytest.raises(ValueError, match="expected 1000 or more, since 12,480 pairs"):
        found.at(500)
    assert found.recommended == found.rows[0].similarity == found.at(1500)
    few = persons(2)
    with pytest.raises(ValueError, match="expected 20 pairs of different persons or more"):
        measure_thresholds(few, few, "drawn", "pairs")


def test_images_without_identity_and_the_image_itself_do_not_count() -> None:
    features = persons(20)
    features.pids[::3] = -1
    features.camids[:] = -1
    found = measure_thresholds(features, features, "drawn", "clusters")
    pids = features.pids[features.pids >= 0]
    same = int((pids[:, None] == pids).sum() - len(pids)) // 2
    assert found.same_pairs == same
    assert found.other_pairs == len(pids) * (len(pids) - 1) // 2 - same


def test_query_against_gallery_counts_each_pair_once() -> None:
    features = persons(20)
    query, gallery = features[::2], features[1::2]  # cameras 0 and 1
    found = measure_thresholds(query, gallery, "drawn", "pairs")
    assert found.same_pairs == 20 * 2 * 2
    assert found.other_pairs == 40 * 40 - 80


def test_nothing_to_compare_is_an_error() -> None:
    alone = persons(10, each=1)
    with pytest.raises(ValueError, match="expected pairs of the same person and of different"):
        measure_thresholds(alone, alone, "drawn", "pairs")
    with pytest.raises(ValueError, match="expected one threshold or more"):
        Thresholds("pairs", "x", 1, 1, [])


def test_the_table_says_where_it_comes_from() -> None:
    numbers = (0.9, 10.0, 0.25), (0.8, 20.0, 0.5), (0.7, 100.0, 1.0)
    rows = [ThresholdRow(*row) for row in numbers]
    text = str(Thresholds("pairs", "shop", 30, 4000, rows))
    assert text.startswith("Same person or not, from labelled pairs\n")
    assert "\nshop: 30 pairs of one person, 4,000 of two\n" in text
    assert "0.9000" in text
    assert "25.0%" in text
    assert "0.8000" not in text  # powers of ten alone
    clusters = Thresholds("clusters", "shop", 30, 4000, rows)
    assert "the true figures are worse" in str(clusters)
    assert clusters.false_per_million(0.85) == 20
    assert clusters.false_per_million(0.95) == 10
    assert clusters.false_per_million(0.69) is None
    assert clusters.recommended == 0.7
    assert clusters.at(99) == 0.8


def test_features_that_are_all_alike_have_no_threshold() -> None:
    features = FeatureSet.of(torch.eye(1, 4).repeat(40, 1), torch.arange(40) // 4)
    with pytest.raises(ValueError, match="not exactly alike, got 720"):
        measure_thresholds(features, features, "drawn", "pairs")
