"""Average linkage: equal to SciPy's, in memory and on disk, with ties."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from reid.labelling.linkage import (
    average_linkage,
    cut_below,
    cut_to_clusters,
    distance_at_share,
    fill_upper_triangle,
    pair_matrix,
)
from reid.structures import DataError

Array = npt.NDArray[np.float32]


def distances(count: int, seed: int = 0) -> Array:
    """Symmetric distances in float32."""
    points = np.random.default_rng(seed).normal(size=(count, 3))
    found: Array = np.linalg.norm(points[:, None] - points[None], axis=2).astype(np.float32)
    return found


def same_partition(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> bool:
    pairs = {*zip(one.tolist(), other.tolist(), strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("count", [2, 3, 10, 150])
def test_merges_are_scipys(count: int) -> None:
    full = distances(count)
    expected = linkage(squareform(full.astype(np.float64), checks=False), "average")
    merges = average_linkage(full.copy())
    np.testing.assert_allclose(merges.height, expected[:, 2], rtol=1e-5)
    for clusters in {1, 2, count // 2, count}:
        if clusters:
            theirs = fcluster(expected, clusters, "maxclust")
            assert same_partition(cut_to_clusters(merges, clusters), theirs)
    limit = float(expected[count // 2 - 1, 2]) + 1e-4
    assert same_partition(cut_below(merges, limit), fcluster(expected, limit, "distance"))


def test_ties_end_and_give_the_number_asked_for() -> None:
    for seed in range(5):
        full = np.round(distances(60, seed)).astype(np.float32)  # most distances are equal
        full[:30, 30:] = full[30:, :30] = 0.1
        np.fill_diagonal(full, 0)
        merges = average_linkage(full.copy())
        for clusters in (1, 7, 59, 60, 100):
            assert len(np.unique(cut_to_clusters(merges, clusters))) == min(clusters, 60)
    same = average_linkage(np.zeros((9, 9), np.float32))
    assert len(np.unique(cut_to_clusters(same, 4))) == 4
    assert len(np.unique(cut_below(same, 0.0))) == 9


def test_one_image_is_one_cluster() -> None:
    merges = average_linkage(np.zeros((1, 1), np.float32))
    assert cut_to_clusters(merges, 5).tolist() == cut_below(merges, 1.0).tolist() == [0]


def test_only_the_upper_triangle_counts_on_disk_too() -> None:
    rows = np.random.default_rng(1).uniform(size=(300, 300))
    upper = np.triu(rows, 1)
    for in_memory in (10**9, 0):
        with pair_matrix(300, in_memory) as matrix:
            assert isinstance(matrix, np.memmap) == (not in_memory)
            fill_upper_triangle(matrix, lambda start, stop: rows[start:stop])
            np.testing.assert_allclose(matrix, upper + upper.T, rtol=1e-6)
            merges = average_linkage(matrix)
        expected = linkage(squareform(upper + upper.T), "average")
        np.testing.assert_allclose(merges.height, expected[:, 2], rtol=1e-5)


def test_the_old_entries_are_there_while_the_matrix_is_filled() -> None:
    full = distances(3000)
    matrix = full.copy()  # more than one block of rows
    fill_upper_triangle(matrix, lambda start, stop: 1 + np.triu(matrix[start:stop], start + 1))
    upper = np.triu(1 + full, 1)
    np.testing.assert_array_equal(matrix, upper + upper.T)


def test_the_distance_at_a_share_is_an_entry() -> None:
    full = distances(50)
    full[:20, :20] = 0  # zeros do not count
    values = np.sort(full[np.triu_indices(50, 1)])
    values = values[values > 0]
    for share in (0.0, 0.0017, 0.3, 0.999, 1.0):
        place = min(round(share * len(values)), len(values) - 1)
        assert distance_at_share(full, share) == values[place]
    assert distance_at_share(np.zeros((5, 5), np.float32), 0.5) == 0


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with (
        pytest.raises(DataError, match=r"300 images need 0\.0 GB .*No space left.*TMPDIR"),
        pair_matrix(300, 0),
    ):
        pass
