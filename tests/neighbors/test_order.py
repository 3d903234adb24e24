"""The order of the rows: near ones together, and a search whose lists do not show it."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reid.neighbors import candidates, exact, order


def in_turns(persons: int, each: int, dim: int) -> torch.Tensor:
    """Unit vectors: one of each person, then another of each, and so on."""
    generator = torch.Generator().manual_seed(persons)
    centres = torch.randn(persons, dim, generator=generator).repeat(each, 1)
    return F.normalize(centres + 0.1 * torch.randn(centres.shape, generator=generator), dim=1)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_products_are_read_alike_by_python_and_compiled_code(kind: torch.dtype) -> None:
    tensor = torch.tensor([0.0, -0.0, 1.5, -3.25, 1e30, 1e-30, torch.inf]).to(kind)
    compiled = numba.njit(lambda product: candidates._value(product))
    for product, expected in zip(candidates.tile_of(tensor), tensor.float().numpy(), strict=True):
        for found in (candidates._value(product), compiled(product)):
            assert np.float32(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_rows_move_in_place(count: int, kind: torch.dtype) -> None:
    rows = torch.randn(count, 5).to(kind)
    for seed in range(5):
        places = np.random.default_rng(seed).permutation(count).astype(np.int32)
        moved = rows.clone()
        order.reorder(moved, places)
        assert torch.equal(moved, rows[torch.from_numpy(places)])


def test_near_rows_follow_each_other_and_own_rows_stay_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order, "_GROUP", 10)
    persons, each, first, last = 60, 10, 150, 400
    rows = in_turns(persons, each, 32)
    norms = np.full(len(rows), 0.5, np.float32)
    found = order.near_order(rows, norms, first, last)
    assert found.dtype == np.int32
    for start, stop in ((0, first), (first, last), (last, len(rows))):
        np.testing.assert_array_equal(np.sort(found[start:stop]), np.arange(start, stop))
    whole = order.near_order(rows, norms, 0, len(rows))
    beside = (np.diff(whole % persons) == 0).mean()
    assert beside > 0.3  # of rows in turns, none


@pytest.mark.parametrize("dims", [0, 8])
@pytest.mark.parametrize(("first", "last"), [(0, 600), (0, 250), (250, 251), (251, 600)])
def test_a_share_of_the_rows_has_the_lists_of_all(
    first: int, last: int, dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = in_turns(60, 10, 24).numpy()
    task = exact.SearchTask(rows, 12, 64, True, "cpu", dims)
    expected = exact.neighbors_of(task, 0, len(rows), None)
    orders = []
    made = exact.near_order

    def watched(*arguments: object) -> object:
        orders.append(made(*arguments))  # type: ignore[arg-type]
        return orders[-1]

    monkeypatch.setattr(exact, "near_order", watched)
    monkeypatch.setattr(exact, "FEWEST", 1)
    monkeypatch.setattr(order, "_GROUP", 16)
    found = exact.neighbors_of(task, first, last, None)
    np.testing.assert_array_equal(found, expected[first:last])
    assert len(orders) == 1
    assert (np.diff(orders[0]) != 1).any()


def test_rows_that_are_not_copied_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = in_turns(20, 5, 16).numpy()
    before = rows.copy()
    monkeypatch.setattr(exact, "FEWEST", 1)
    exact.neighbors_of(exact.SearchTask(rows, 5, 64, False, "cpu", 0), 0, len(rows), None)
    np.testing.assert_array_equal(rows, before)
