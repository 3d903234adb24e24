"""The inverted file: what it finds, and that it is the exact search where all lists are visited."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from reid.neighbors import approximate_neighbors, exact, inverted, nearest_neighbors, tiles


def persons(count: int, each: int, dim: int = 32, noise: float = 0.3) -> torch.Tensor:
    """Unit vectors of some persons, in a random order."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, dim, generator=generator).repeat_interleave(each, 0)
    rows = rows + noise * torch.randn(rows.shape, generator=generator)
    return F.normalize(rows[torch.randperm(len(rows), generator=generator)], dim=1)


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Products in each of the two types."""
    monkeypatch.setattr(exact, "fast_bfloat16", lambda device: request.param)
    return bool(request.param)


@pytest.fixture
def small_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lists of few rows, visited whatever that costs, and blocks that cut them."""
    monkeypatch.setattr(inverted, "_FEWEST_IN_A_LIST", 4)
    monkeypatch.setattr(inverted, "_MOST_VISITED", 1.0)
    monkeypatch.setattr(inverted, "BLOCK_SIZE", 48)
    monkeypatch.setattr(tiles, "PADDING", 5)


@pytest.mark.usefixtures("half")
def test_most_neighbors_are_found(caplog: pytest.LogCaptureFixture) -> None:
    features = persons(100, 40)
    true = nearest_neighbors(features, 20)
    with caplog.at_level(logging.INFO, inverted.__name__):
        found = approximate_neighbors(features, 20, "ivf")
    share = inverted.share_found(found, true)
    assert 0.97 < share < 1
    told = caplog.messages[-1]
    assert "of the neighbours of 512 rows" in told
    assert float(told.split()[4]) == pytest.approx(share, abs=0.02)
    visited, number = (int(word) for word in told.split("compared with ")[1].split()[:3:2])
    assert number == 62
    assert 1 <= visited <= number / 3
    assert (found[:, 0] == np.arange(len(found))).all()
    assert (np.diff(np.sort(found, 1), axis=1) > 0).all()
    assert (found.min(), found.max()) == (0, len(found) - 1)


@pytest.mark.usefixtures("small_lists", "half")
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_all_lists_hold_the_exact_neighbors(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverted.Centres, "visits", lambda centres, *_: len(centres.norms))
    features = scale * torch.cat((persons(30, 10), torch.randn(11, 32)))
    before = features.clone()
    found = approximate_neighbors(features, 17, "ivf")
    np.testing.assert_array_equal(found, nearest_neighbors(features, 17))
    assert torch.equal(features, before)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*3 * [st.integers(-2, 2)]), min_size=1, max_size=60),
    st.integers(1, 60),
    st.integers(1, 8),
)
def test_ties_and_duplicates(rows: list[tuple[int, ...]], k: int, visits: int) -> None:
    features = torch.tensor(rows, dtype=torch.float32)
    k = min(k, len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverted, "_FEWEST_IN_A_LIST", 2)
        patch.setattr(inverted, "_MOST_VISITED", 1.0)
        patch.setattr(inverted.Centres, "visits", lambda centres, *_: len(centres.norms))
        found = approximate_neighbors(features, k, "ivf")
        np.testing.assert_array_equal(found, nearest_neighbors(features, k))
        patch.setattr(
            inverted.Centres, "visits", lambda centres, *_: min(visits, len(centres.norms))
        )
        found = approximate_neighbors(features, k, "ivf")
    assert (found[:, 0] == np.arange(len(found))).all()
    assert (np.diff(np.sort(found, 1), axis=1) > 0).all()
    assert 0 <= found.min() <= found.max() < len(found)


def heaps(*sizes: int, noise: float = 0.0) -> torch.Tensor:
    """Unit vectors in heaps of some sizes, which are points without noise."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(len(sizes), 16, generator=generator)
    rows = centres.repeat_interleave(torch.tensor(sizes), 0)
    return F.normalize(rows + noise * torch.randn(rows.shape, generator=generator), dim=1)


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize(
    "features",
    [heaps(1500), heaps(700, 700)],
    ids=["equal", "two points"],
)
def test_heaps_of_equal_rows(features: torch.Tensor, k: int) -> None:
    """Rounding leaves these rows in doubt, and their centres are equally near."""
    found = approximate_neighbors(features, k, "ivf")
    np.testing.assert_array_equal(found, nearest_neighbors(features, k))


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("k", [1, 20])
def test_rows_more_alike_than_products_can_tell(k: int) -> None:
    sizes = (2000, *20 * [30])
    found = approximate_neighbors(heaps(*sizes, noise=0.01), k, "ivf")
    heap = np.repeat(np.arange(len(sizes)), sizes)
    assert (found[:, 0] == np.arange(len(found))).all()
    assert (np.diff(np.sort(found, 1), axis=1) > 0).all()
    assert (heap[found] == heap[:, None]).all()


@pytest.mark.usefixtures("small_lists", "half")
def test_rows_whose_lists_are_too_short_are_compared_with_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inverted.Centres, "visits", lambda *_: 1)
    monkeypatch.setattr(inverted, "take_first", first_list_only)
    features = persons(40, 10)
    # 40 lists of about 10 rows: none has 30
    found = approximate_neighbors(features, 30, "ivf")
    np.testing.assert_array_equal(found, nearest_neighbors(features, 30))


def first_list_only(products: object, norms: object, places: np.ndarray, *arrays: object) -> None:
    """Each row visits one list alone, in turns."""
    _, scores, index, filled, *_ = arrays
    assert isinstance(scores, np.ndarray)
    assert isinstance(index, np.ndarray)
    assert isinstance(filled, np.ndarray)
    scores[:, 0], index[:, 0], filled[:] = 1, places % 40, 1


def test_the_exact_search_where_a_third_of_the_lists_would_be_visited(
    caplog: pytest.LogCaptureFixture,
) -> None:
    features = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, inverted.__name__):
        found = approximate_neighbors(features, 10, "ivf")
    assert "lists of the inverted file, so all are compared" in caplog.messages[-1]
    np.testing.assert_array_equal(found, nearest_neighbors(features, 10))


def test_as_many_visits_as_hold_the_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = persons(60, 20)
    lists = nearest_neighbors(rows, 15)[::4]
    which = np.arange(0, len(rows), 4, dtype=np.int32)
    centres = inverted.Centres.train(rows, 50, torch.float32)
    scores = (rows @ centres.rows.T - centres.rows.square().sum(1) / 2).numpy()
    home, order = scores.argmax(1), (-scores).argsort(1)
    shares = []
    for visits in range(1, 51):
        held = [(home[near[1:]][:, None] == order[row, :visits]).any(1)
                for row, near in zip(which, lists, strict=True)]  # fmt: skip
        shares.append(np.mean(held))
    for recall in (0.5, 0.9, 0.99, 1.0):
        monkeypatch.setattr(inverted, "RECALL", recall)
        expected = 1 + next(number for number, share in enumerate(shares) if share >= recall)
        assert centres.visits(rows, which, lists) == expected
    assert centres.visits(rows, which, lists[:, :1]) == 1


def test_centres_are_means_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverted, "_TRAINED_PER_LIST", 50)
    rows = persons(8, 50, noise=0.05)
    centres = inverted.Centres.train(rows, 8, torch.float32)
    home = centres.scores(rows).argmax(1)
    for number in home.unique():
        torch.testing.assert_close(centres.rows[number], rows[home == number].mean(0))


@pytest.mark.usefixtures("small_lists")
def test_progress_reaches_the_end() -> None:
    told: list[tuple[int, int]] = []
    features = persons(30, 20)
    approximate_neighbors(features, 5, "ivf", progress=lambda *done: told.append(done))
    assert told[-1] == (600, 600)
    done = [number for number, _ in told]
    assert done == sorted(done)
    assert len(told) > math.sqrt(600)


def test_share_found() -> None:
    true = np.array([[0, 1, 2, 3], [1, 0, 2, 3]], np.int32)
    found = np.array([[0, 3, 1, 9], [1, 7, 8, 2]], np.int32)
    assert inverted.share_found(found, true) == 0.5
    assert inverted.share_found(found[:, :1], true[:, :1]) == 1.0
