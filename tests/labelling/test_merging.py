"""Steps of counted merges against all pairs, sorted and walked."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.labelling import merging
from reid.labelling.merging import AverageLinkage, SingleLinkage, merge_step
from reid.neighbors import Labels


def groups(count: int, dim: int, noise: float, seed: int) -> Tensor:
    """Unit vectors about a fifth as many centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(2, count // 5), dim, generator=generator)
    rows = centres[torch.arange(count) % len(centres)]
    return F.normalize(rows + noise * torch.randn(count, dim, generator=generator), dim=1)


def walked(distances: dict[tuple[int, int], float], count: int, merges: int) -> list[int]:
    """All pairs of clusters in ascending order; the larger number takes the smaller."""
    label = list(range(count))
    for _, (a, b) in sorted((d, pair) for pair, d in distances.items()):
        if label[a] != label[b] and merges:
            low, high = sorted((label[a], label[b]))
            label = [low if x == high else x for x in label]
            merges -= 1
    return [sorted(set(label)).index(x) for x in label]


def single(u: Tensor, cluster: Labels, penalty: float, merges: int) -> list[int]:
    sizes = np.bincount(cluster)
    best: dict[tuple[int, int], float] = {}
    for i, j in combinations(range(len(u)), 2):
        a, b = sorted((int(cluster[i]), int(cluster[j])))
        q = float((u[i].double() - u[j].double()).square().sum()) + penalty * (sizes[a] + sizes[b])
        if a != b and q < best.get((a, b), np.inf):
            best[a, b] = q
    return walked(best, len(sizes), merges)


def average(u: Tensor, cluster: Labels, merges: int) -> list[int]:
    whole = torch.cdist(u.double(), u.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
    count = int(cluster.max()) + 1
    rows = [np.flatnonzero(cluster == c) for c in range(count)]
    means = {
        (a, b): float(whole[np.ix_(rows[a], rows[b])].mean())
        for a, b in combinations(range(count), 2)
    }
    return walked(means, count, merges)


@pytest.mark.parametrize("noise", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("neighbors", [2, 4, 16, 100])
def test_steps_are_those_of_all_pairs(
    noise: float, neighbors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Short lists must be proven or completed; small blocks must fit together.
    monkeypatch.setattr(merging, "_FIRST_NEIGHBORS", neighbors)
    monkeypatch.setattr(merging, "_MOST_NEIGHBORS", neighbors)
    monkeypatch.setattr(merging, "_BLOCK", 16)
    u = groups(60, 12, noise, seed=neighbors)
    one = two = np.arange(60)
    for merges in (20, 10, 9, 1, 17):
        new = merge_step(SingleLinkage(u, one, 0.01), merges)
        assert new.tolist() == single(u, one, 0.01, merges)
        one = new[one]
        new = merge_step(AverageLinkage(u, two), merges)
        assert new.tolist() == average(u, two, merges)
        two = new[two]


def test_only_near_pairs_of_clusters_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    plain = AverageLinkage.pairs

    def pairs(self: AverageLinkage, one: Labels, other: Labels) -> merging.Pairs:
        nonlocal counted
        counted += len(one)
        return plain(self, one, other)

    monkeypatch.setattr(AverageLinkage, "pairs", pairs)
    u = groups(400, 32, 0.2, seed=0)
    new = merge_step(AverageLinkage(u, np.arange(400)), 100)
    assert counted < 400 * 399 / 2 / 8
    assert new.tolist() == average(u, np.arange(400), 100)


def test_equal_features_and_equal_distances_have_an_order() -> None:
    u = F.normalize(torch.tensor([[1.0, 0.0], [0, 1], [1, 0], [0, 1], [1, 0]]), dim=1)
    for linkage in (SingleLinkage(u, np.arange(5), 0.1), AverageLinkage(u, np.arange(5))):
        assert merge_step(linkage, 1).tolist() == [0, 1, 0, 2, 3]
        assert merge_step(linkage, 3).tolist() == [0, 1, 0, 1, 0]
        assert merge_step(linkage, 4).tolist() == [0] * 5


@pytest.mark.parametrize("merges", [0, 5, 6, -1])
def test_a_step_must_leave_a_cluster(merges: int) -> None:
    u = groups(5, 4, 1.0, seed=0)
    with pytest.raises(ValueError, match=f"num_merges: expected 1 to 4.* got {merges}"):
        merge_step(SingleLinkage(u, np.arange(5), 0.0), merges)
