"""AP, CMC and mINP against brute force in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reid.evaluation import distances
from reid.evaluation.ranking import rank, rank_distances
from reid.structures import FeatureSet


def sets(
    q_pids: np.ndarray, g_pids: np.ndarray, q_cams: np.ndarray, g_cams: np.ndarray
) -> list[FeatureSet]:
    """Images with dummy features."""
    return [
        FeatureSet.of(torch.zeros(len(pids), 1), torch.from_numpy(pids), torch.from_numpy(cams))
        for pids, cams in ((q_pids, q_cams), (g_pids, g_cams))
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40), st.integers(1, 5),
    st.integers(0, 3), st.sampled_from((2, 10, 10**6)), st.integers(1, 9),
)  # fmt: skip
def test_numbers_are_those_of_sorted_lists(
    seed: int, num_query: int, num_gallery: int, num_pids: int, num_cameras: int, levels: int,
    block: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    distance = (rng.integers(0, levels, (num_query, num_gallery)) / levels).astype(np.float32)
    q_pids, g_pids = (rng.integers(-1, num_pids, n) for n in (num_query, num_gallery))
    q_cams, g_cams = (rng.integers(-1, num_cameras, n) for n in (num_query, num_gallery))
    aps, inps, firsts = [], [], []
    for i in range(num_query):
        order = np.lexsort((g_pids == q_pids[i], distance[i]))  # ties: wrong ones first
        same = g_pids[order] == q_pids[i]
        removed = same & (g_cams[order] == q_cams[i]) & (q_cams[i] >= 0)
        hits = np.flatnonzero(same[~removed & (g_pids[order] != -1)])
        if len(hits) and q_pids[i] != -1:
            aps.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
            inps.append(len(hits) / (hits[-1] + 1))
            firsts.append(hits[0])
    blocks = [(s, distance[s : s + block]) for s in range(0, num_query, block)]
    both = sets(q_pids, g_pids, q_cams, g_cams)
    if not aps:  # single camera, all junk, or no positive
        with pytest.raises(ValueError, match="no query has a match"):
            rank_distances(blocks, *both)
        return
    result = rank_distances(blocks, *both, max_rank=5)
    assert result.mAP == pytest.approx(np.mean(aps), abs=1e-12)
    assert result.mINP == pytest.approx(np.mean(inps), abs=1e-12)
    expected = [np.mean(np.array(firsts) <= k) for k in range(5)]
    np.testing.assert_allclose(result.cmc, expected, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 300))
def test_features_rank_like_their_distances(seed: int, num_query: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(num_query + 50, 6)).astype(np.float32))
    rows = torch.arange(len(features))
    both = FeatureSet.of(features, rows % 4, rows % 3)
    query, gallery = both[:num_query], both[num_query:]
    exact = torch.cdist(query.test.double(), gallery.test.double()).square().numpy()
    expected = rank_distances([(0, exact)], query, gallery)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "_BLOCK_BYTES", block * 4 * 2048)
        found = rank(query, gallery).ranking
    np.testing.assert_allclose(found.average_precision, expected.average_precision, atol=1e-6)
