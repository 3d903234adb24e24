"""The search with projected rows: the lists of the search without, and when it is chosen."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from reid.neighbors import exact, nearest_neighbors, order, plan
from reid.neighbors.kernels import Floats, half_squared_norms
from reid.neighbors.plan import Plan, plan_search
from reid.neighbors.projection import principal_axes, project


def near_few_directions(count: int, dim: int, directions: int = 6) -> torch.Tensor:
    """Unit vectors in groups of 10, most of them in a few directions, as a network's features."""
    generator = torch.Generator().manual_seed(count)
    basis = torch.randn(directions, dim, generator=generator)
    centres = torch.randn(max(1, count // 10), directions, generator=generator)
    latent = centres[torch.arange(count) % len(centres)]
    latent = latent + 0.3 * torch.randn(count, directions, generator=generator)
    noise = 0.1 * torch.randn(count, dim, generator=generator)
    return F.normalize(latent @ basis + noise, dim=1)


@st.composite
def odd_features(draw: st.DrawFn) -> torch.Tensor:
    """Vectors with many equal ones, zeros, few directions, other lengths, or none of these."""
    count, dim = draw(st.integers(1, 90)), draw(st.sampled_from((1, 2, 5, 16, 33)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    rows = rng.normal(size=(count, dim))
    kind = draw(st.sampled_from(("equal", "zeros", "flat", "lengths", "close", "coarse", "random")))
    if kind == "equal":
        rows = rows[rng.integers(0, max(1, count // 4), count)]
    elif kind == "zeros":
        rows[rng.random(count) < 0.5] = 0
    elif kind == "flat":
        rows[:, dim // 2 :] = 0
    elif kind == "lengths":
        rows *= 10.0 ** rng.integers(-6, 6, (count, 1))
    elif kind == "close":
        rows = rows[:1] + 1e-4 * rows
    elif kind == "coarse":
        rows = np.round(rows)
    return torch.from_numpy(rows.astype(np.float32))


@settings(max_examples=80, deadline=None)
@given(odd_features(), st.integers(1, 60), st.booleans(), st.data())
def test_lists_do_not_depend_on_projection_and_order(
    features: torch.Tensor, k: int, half: bool, data: st.DataObject
) -> None:
    k, dims = min(k, len(features)), data.draw(st.integers(1, features.shape[1]))
    sizes = st.sampled_from((7, 16, 64))
    fewest = data.draw(st.sampled_from((1, exact.FEWEST)))  # with an order of the rows, and without
    with mock.patch.object(exact, "FEWEST", fewest), mock.patch.object(order, "_GROUP", 8):
        found = nearest_neighbors(
            features, k, block_size=data.draw(sizes), half_precision=half, dims=dims
        )
    plain = nearest_neighbors(
        features, k, block_size=data.draw(sizes), half_precision=not half, dims=0
    )
    np.testing.assert_array_equal(found, plain)
    rows = features.double().numpy()
    scores = rows @ rows.T - (rows**2).sum(1) / 2
    np.fill_diagonal(scores, np.inf)
    expected = -np.sort(-scores, 1)[:, :k]
    scale = np.abs(rows).max() ** 2 * rows.shape[1] + 1e-300
    np.testing.assert_allclose(
        np.take_along_axis(scores, found, 1)[:, 1:] / scale, expected[:, 1:] / scale, atol=1e-13
    )


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(("dims", "searched"), [(40, 1), (7, 1), (2, 2)])
def test_rows_in_doubt_are_searched_without_a_projection(
    half: bool, dims: int, searched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = near_few_directions(1500, 40)
    calls = []
    candidates = exact._candidates

    def watched(task: exact.SearchTask, level: Plan, *rest: object, some: bool) -> object:
        calls.append(level.dims)
        return candidates(task, level, *rest, some=some)  # type: ignore[arg-type]

    expected = nearest_neighbors(features, 10, dims=0)
    monkeypatch.setattr(exact, "_candidates", watched)
    found = nearest_neighbors(features, 10, block_size=256, half_precision=half, dims=dims)
    assert np.array_equal(found, expected)
    assert calls[0] == dims % 40
    assert len(calls) == searched


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("k", [1, 20, 400])
def test_long_and_short_lists_are_certain_at_once(
    k: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = F.normalize(torch.randn(1500, 24, generator=torch.Generator().manual_seed(0)))
    doubts = []
    rescore = exact.rescore

    def watched(*arguments: object) -> object:
        found = rescore(*arguments)  # type: ignore[arg-type]
        doubts.append(float(found[1].mean()))
        return found

    monkeypatch.setattr(exact, "rescore", watched)
    nearest_neighbors(features, k, block_size=512, half_precision=half, dims=0)
    assert doubts[0] < 0.1


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [1, 5, 30])
def test_products_of_projected_rows_are_bounds(dims: int, kind: torch.dtype) -> None:
    rows = near_few_directions(700, 30).numpy()
    rows[::5] *= 3
    rows[3] = 0
    axes, shares = principal_axes(rows)
    assert np.allclose(axes.T @ axes, np.eye(30), atol=1e-13)
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 0).all()
    short = project(rows, axes[:, :dims], kind)
    assert short.rows.shape == (700, dims + 1)
    products = (short.rows @ short.rows.T).double().numpy()
    excess = products + short.bound - rows.astype(np.float64) @ rows.T.astype(np.float64)
    assert excess.min() >= 0
    if dims == 30:  # nothing is left out, so the bound is close
        assert excess.max() < (0.2 if kind == torch.bfloat16 else 1e-3)


def plan_of(
    rows: Floats, monkeypatch: pytest.MonkeyPatch, dims: int | None = None, whole: float = 1e-6
) -> Plan:
    """The plan for a CPU whose products take a time in proportion to their length."""
    monkeypatch.setattr(
        plan, "_seconds_of_pair", lambda rows, width, kind: whole * width / rows.shape[1]
    )
    plain = Plan(0, 62, True)
    norms = half_squared_norms(rows)
    return plan_search(rows, norms, 20, len(rows), plain, dims, 2 * rows.shape[1] + 480)


def test_a_sample_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    few = near_few_directions(4000, 128).numpy()
    assert plan_of(few, monkeypatch).dims == 0  # too few pairs
    monkeypatch.setattr(plan, "LEAST_PAIRS", 0)
    assert plan_of(few, monkeypatch, whole=1e-12).dims == 0  # nothing to save
    found = plan_of(few, monkeypatch)
    assert found.dims in (31, 63)
    assert found.axes is not None
    assert found.axes.shape == (128, found.dims)
    assert 2 * (found.dims + 1) + 8 * found.room <= 2 * 128 + 480
    assert plan_of(few, monkeypatch, dims=50).dims == 50
    assert plan_of(few, monkeypatch, dims=128).dims == 0
    isotropic = F.normalize(torch.randn(4000, 128, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(plan, "_needed", None)  # its axes suffice
    assert plan_of(isotropic.numpy(), monkeypatch).dims == 0


def test_many_candidates_speak_against_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    # the axes look well, but neighbours differ in the other directions only
    generator = torch.Generator().manual_seed(0)
    rows = 0.25 * torch.randn(4000, 128, generator=generator)
    rows[:, 0] = 20
    monkeypatch.setattr(plan, "LEAST_PAIRS", 0)
    assert plan_of(F.normalize(rows, dim=1).numpy(), monkeypatch).dims == 0


def test_the_plan_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    features = near_few_directions(3000, 128)
    expected = nearest_neighbors(features, 20, dims=0)
    plans = []

    def watched(*arguments: object) -> Plan:
        plans.append(plan_search(*arguments))  # type: ignore[arg-type]
        return plans[-1]

    monkeypatch.setattr(plan, "LEAST_PAIRS", 0)
    monkeypatch.setattr(plan, "_seconds_of_pair", lambda rows, width, kind: 1e-8 * width)
    monkeypatch.setattr(exact, "plan_search", watched)
    assert np.array_equal(nearest_neighbors(features, 20), expected)
    assert [found.dims > 0 for found in plans] == [True]


def test_errors() -> None:
    features = near_few_directions(20, 8)
    for dims in (-1, 9):
        with pytest.raises(ValueError, match=f"dims: expected 0 to .* 8, got {dims}"):
            nearest_neighbors(features, 3, dims=dims)


def test_scores_in_half_precision_are_within_their_bound() -> None:
    # 1.0039 lies between two numbers of bfloat16, which are 2^-7 apart
    for value in (1.00390625, 1.4256, 1.99):
        rows = np.full((3, 1), value**0.5, np.float32)
        halves, norms = torch.from_numpy(rows).bfloat16(), half_squared_norms(rows)
        score = float((halves @ halves.T)[0, 1]) - norms[0]
        error = abs(score - (float(rows[0, 0]) ** 2 - norms[0]))
        rounding = exact.largest_rounding(rows, halves)
        assert error <= exact.half_rounding_bound(1, float(norms.max()), rounding)
