"""Neighbour lists without the vector itself, and how far two of them agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reid.neighbors import list_agreement, other_neighbors


def test_lists_are_those_of_all_distances() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(features.double(), features.double()).fill_diagonal_(torch.inf)
    found = other_neighbors(features, 7)
    assert np.array_equal(found, distance.topk(7, largest=False).indices.numpy())


def test_a_duplicate_is_a_neighbour_and_the_vector_itself_is_not() -> None:
    features = torch.eye(5)[[0, 1, 1, 1, 2]]
    found = other_neighbors(features, 2)
    assert [sorted(row) for row in found[1:4].tolist()] == [[2, 3], [1, 3], [1, 2]]
    assert all(number not in row for number, row in enumerate(found.tolist()))


@pytest.mark.parametrize(("count", "length"), [(1, 0), (2, 1), (5, 4)])
def test_fewer_vectors_than_neighbours(count: int, length: int) -> None:
    assert other_neighbors(torch.eye(count, 5), 20).shape == (count, length)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="k: expected 1 or more, got 0"):
        other_neighbors(torch.eye(3), 0)
    with pytest.raises(ValueError, match="N, D > 0"):
        other_neighbors(torch.zeros(0, 3), 2)


def test_agreement_is_the_share_of_common_neighbours() -> None:
    rng = np.random.default_rng(0)
    one, other = (
        np.stack([rng.permutation(12)[:5] for _ in range(30)]).astype(np.int32) for _ in range(2)
    )
    expected = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(one, other, strict=True)]
    assert list_agreement(one, other) == pytest.approx(expected, abs=1e-7)
    assert list_agreement(one, one).tolist() == [1.0] * 30
    assert list_agreement(one, one + 12).tolist() == [0.0] * 30
    empty = np.zeros((3, 0), np.int32)
    assert list_agreement(empty, empty).tolist() == [1.0] * 3
