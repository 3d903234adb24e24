"""Indexes find what the exact search finds, and take no arrays that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from reid.neighbors.indexes import Graph, Index, build_index, restore_index
from reid.neighbors.recall import tune_index
from reid.neighbors.similar import most_similar

Floats = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]


def persons(count: int, dim: int = 8, seed: int = 0) -> Floats:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(max(1, count // 10), dim))
    rows = centres[generator.integers(len(centres), size=count)]
    rows = rows + 0.3 * generator.normal(size=rows.shape)
    features: Floats = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return features


@pytest.fixture(scope="module")
def features() -> Floats:
    return persons(800)


@pytest.fixture(scope="module")
def graph(features: Floats) -> Index:
    index = build_index("hnsw", features)
    assert index is not None
    return index


@pytest.fixture(scope="module")
def many() -> Floats:
    return persons(10_000)


@pytest.fixture(scope="module")
def codes(many: Floats) -> Index:
    index = build_index("ivfpq", many)
    assert index is not None
    return index


def test_the_exact_search_is_the_sorted_product(
    features: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reid.neighbors.similar.BLOCK_ROWS", 90)
    monkeypatch.setattr("reid.neighbors.similar._BLOCK_QUERIES", 7)
    queries = persons(20, seed=3)
    product = queries @ features.T
    done: list[tuple[int, int]] = []
    scores, rows = most_similar(
        None, queries, features, 12, progress=lambda *pair: done.append(pair)
    )
    np.testing.assert_allclose(scores, -np.sort(-product)[:, :12], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(product, rows, 1), scores, atol=1e-6)
    assert done == [(7, 20), (14, 20), (20, 20)]
    allowed = np.zeros(800, bool)
    allowed[[3, 95, 700]] = True
    scores, rows = most_similar(None, queries, features, 5, allowed=allowed)
    assert all({*line[:3]} == {3, 95, 700} for line in rows.tolist())
    assert (rows[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()
    assert most_similar(None, queries[:0], features, 5).rows.shape == (0, 5)


@pytest.mark.parametrize(("kind", "gallery"), [("graph", "features"), ("codes", "many")])
def test_an_index_finds_nearly_all_and_comes_back(
    kind: str, gallery: str, request: pytest.FixtureRequest
) -> None:
    index: Index = request.getfixturevalue(kind)
    rows: Floats = request.getfixturevalue(gallery)
    recall = tune_index(index, rows)
    assert recall.value > 0.9
    assert recall.sample == 256
    queries = persons(50, seed=4)
    exact = most_similar(None, queries, rows, 5)
    found = most_similar(index, queries, rows, 5)
    pairs = zip(found.rows.tolist(), exact.rows.tolist(), strict=True)
    assert sum(len({*a} & {*b}) for a, b in pairs) > 0.9 * exact.rows.size
    same = found.rows == exact.rows
    np.testing.assert_allclose(found.scores[same], exact.scores[same], atol=1e-6)
    back = restore_index(index.kind, index.arrays(), rows, index.effort)
    assert back is not None
    assert np.array_equal(most_similar(back, queries, rows, 5).rows, found.rows)
    back.add(rows[:3])
    assert len(back) == len(rows) + 3
    assert most_similar(back, queries[:2], np.concatenate((rows, rows[:3])), 5).rows.min() >= 0


def test_a_recall_is_measured_not_assumed(graph: Index, features: Floats) -> None:
    class Blind(Graph):
        def candidates(self, queries: Floats, count: int) -> npt.NDArray[np.int64]:
            return super().candidates(queries, count) // 2

    blind = Blind(graph._index, 32)
    assert tune_index(blind, features).value < 0.6
    assert blind.effort == Graph.efforts[-1]  # it has tried all of them
    duplicates = np.repeat(features[:1], 40, 0)  # any of them is as good as another
    index = build_index("hnsw", duplicates)
    assert index is not None
    assert tune_index(index, duplicates).value == 1
    with pytest.raises(ValueError, match="two vectors or more"):
        tune_index(index, duplicates[:1])


def wrong(name: str, change: Callable[[Any], Any]) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        arrays[name] = change(arrays[name].copy())

    return apply


def put(place: int, value: int) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array.reshape(-1)[place] = value
        return array

    return change


def lead_down(arrays: Arrays) -> None:
    """A link of an upper level to a node that has only the lowest one."""
    levels, links = arrays["levels"], arrays["links"].copy()
    node, low = int(np.argmax(levels > 1)), int(np.argmin(levels))
    widths = np.array([0, 32, 48, 64, 80, 96, 112])
    links[int(widths[levels[:node]].sum()) + 32] = low
    arrays["links"] = links


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("graph", wrong("links", put(0, 800)), "links: expected -1 to 799"),
        ("graph", wrong("links", put(0, -2)), "links: expected -1"),
        ("graph", wrong("links", lambda a: a[:-1]), "links: expected int32"),
        ("graph", wrong("levels", put(0, 99)), "levels: expected 1 to"),
        ("graph", wrong("levels", put(0, 0)), "levels: expected 1 to"),
        ("graph", wrong("levels", lambda a: a.astype(np.int64)), "levels: expected int32"),
        ("graph", wrong("start", put(0, -1)), "start: expected 0 to 799"),
        ("graph", lambda arrays: arrays.pop("start"), "start: expected int64 .*got nothing"),
        ("graph", lead_down, "level 1 links to a node that is not on this level"),
        ("codes", wrong("lists", put(0, 10_000)), "lists: expected 0 to"),
        ("codes", wrong("codes", lambda a: a[:, :0]), "codes: expected uint8"),
        ("codes", wrong("coarse", lambda a: a[:0]), "coarse: expected 1 to 10,000 centres"),
        ("codes", wrong("coarse", lambda a: a * np.nan), "expected finite numbers"),
        ("codes", wrong("centres", lambda a: a[1:]), "centres: expected float32"),
    ],
)
def test_arrays_of_no_index_are_refused(
    kind: str, change: Callable[[Arrays], Any], reason: str, request: pytest.FixtureRequest
) -> None:
    index: Index = request.getfixturevalue(kind)
    rows: Floats = request.getfixturevalue("features" if kind == "graph" else "many")
    arrays = index.arrays()
    change(arrays)
    with pytest.raises(ValueError, match=reason):
        restore_index(index.kind, arrays, rows, 4)


def test_what_cannot_be_built(features: Floats, graph: Index) -> None:
    assert build_index("exact", features) is None
    with pytest.raises(ValueError, match="needs 10,000 images or more, got 800"):
        build_index("ivfpq", features)
    for call in (
        lambda: build_index("flat", features),  # type: ignore[arg-type]
        lambda: restore_index("flat", {}, features, 1),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="expected exact, hnsw or ivfpq, got 'flat'"):
            call()
    with pytest.raises(ValueError, match="effort: expected 1 to 512, got 0"):
        restore_index("hnsw", graph.arrays(), features, 0)
