"""Galleries grow and shrink."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from reid.registry import ConfigError
from reid.workflows.search import upkeep
from reid.workflows.search.features import ModelChoice
from reid.workflows.search.gallery import FILE, read_gallery

if TYPE_CHECKING:
    from tests.workflows.search.conftest import People


def test_an_image_is_added_replaced_or_there_already(people: People) -> None:
    old = read_gallery(people.gallery).features.copy()
    paths = [*people.paths[:2], str(people.folder / "gone.png")]
    more = people.write("more.npz", paths, people.make([0, 5, 5], seed=9))
    Image.new("RGB", (8, 16), (1, 2, 3)).save(people.paths[1])
    change = upkeep.add(people.gallery, [more], ModelChoice())
    assert (change.added, change.replaced, change.unchanged) == (1, 1, 1)
    gallery = read_gallery(people.gallery)
    assert len(gallery) == 25
    assert {*gallery.paths} == {*people.paths, paths[2]}
    place = [*gallery.paths].index(people.paths[1])
    assert not np.allclose(gallery.features[place], old[1])
    assert np.array_equal(gallery.features[0], old[0])
    before = (people.gallery / FILE).stat().st_ino
    again = upkeep.add(people.gallery, [more], ModelChoice())  # nothing new: nothing is written
    assert (again.added, again.replaced, again.unchanged) == (0, 0, 3)
    assert (people.gallery / FILE).stat().st_ino == before


def test_images_are_removed_by_path_folder_and_pattern(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = people.gallery
    assert run_tool("remove", gallery, people.paths[0], "--pattern", "1_?.png") == 0
    assert "5 removed" in capsys.readouterr().out
    assert [*read_gallery(gallery).paths] == [*people.paths[1:4], *people.paths[8:]]
    assert run_tool("remove", gallery, people.paths[0]) == 2
    assert run_tool("remove", gallery) == 2
    assert run_tool("remove", gallery, people.folder / "crops") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "0_0.png: no image of the gallery fits; nothing was removed" in lines[0]
    assert "expected a path or a --pattern" in lines[1]
    assert "all 19 images would go; delete the folder" in lines[2]
    assert len(read_gallery(gallery)) == 19


def test_what_cannot_be_built_leaves_nothing(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("build", people.gallery, people.features) == 2
    assert "has a gallery; add to it, or pass --overwrite" in capsys.readouterr().err
    assert run_tool("build", people.gallery, people.features, "--overwrite") == 0
    new = people.folder / "new"
    zeros = people.write("zeros.npz", ["/a.png"], np.zeros((1, 16)))
    nameless = people.write("nameless.npz", ["/a.png"], np.eye(1, 16), "")
    for sources, reason in (
        ([people.folder / "crops"], "--model: expected the model"),
        ([people.features, people.features], "pass a file of features alone"),
        ([people.features, "--index", "ivfpq"], "ivfpq needs 10,000 images or more, got 24"),
        ([zeros], "all of them are zeros"),
        ([nameless], "names no model"),
        ([people.folder / "missing.npz"], "no such file"),
    ):
        assert run_tool("build", new, *sources) == 2
        assert reason in capsys.readouterr().err
        assert not new.exists()


def test_another_model_s_features_are_refused(
    people: People, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    other = people.write("b.npz", ["/b.png"], people.make([1]), "e" * 64)
    for command in ("add", "query"):
        assert run_tool(command, people.gallery, other) == 2
        text = capsys.readouterr().err
        assert text.startswith("ConfigError: ")
        assert "e" * 16 in text
        assert "f" * 16 in text
    wide = people.write("c.npz", ["/b.png"], people.make([1], dim=20))
    assert run_tool("add", people.gallery, wide) == 2
    assert "expected 16 dimensions as the gallery's, got 20" in capsys.readouterr().err


def test_a_graph_follows_its_gallery(people: People, tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    upkeep.build(folder, [people.features], ModelChoice(), index="hnsw")
    more = people.write("m.npz", [f"/{n}.png" for n in range(6)], people.make([1] * 6))
    grown = upkeep.add(folder, [more], ModelChoice()).gallery
    assert (len(grown), grown.note.kind, grown.note.built_on) == (30, "hnsw", 24)
    assert grown.note.recall is not None
    assert grown.note.recall.value == 1
    gallery = read_gallery(folder)
    index = gallery.index()
    assert index is not None
    assert len(index) == 30
    fewer = upkeep.remove(folder, patterns=["/?.png"]).gallery
    assert (len(fewer), fewer.note.built_on) == (24, 24)


def test_a_low_recall_is_told(
    people: People, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "GOOD_RECALL", 1.1)
    with caplog.at_level(logging.WARNING):
        upkeep.with_index(read_gallery(people.gallery), "hnsw")
    assert "hnsw finds only 1.000 of the 10 nearest images on this data" in caplog.text


def test_settings_out_of_range_are_refused() -> None:
    from reid.workflows.search.query import QuerySettings

    for settings in ({"top": 0}, {"rerank": 5}, {"k1": 0}, {"lambda_value": 2.0}):
        with pytest.raises(ConfigError, match="expected"):
            QuerySettings(**settings)  # type: ignore[arg-type]
