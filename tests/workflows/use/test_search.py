"""tools/search.py from pictures: the gallery brings its model along."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from reid.workflows.predict import Predictor
from reid.workflows.search.gallery import FILE, read_gallery

if TYPE_CHECKING:
    from tests.workflows.use.conftest import Run

TOOL = Path(__file__).parents[3] / "tools" / "search.py"


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments), "--workers", "0"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        return int(stop.value.code or 0)

    return run


def test_pictures_are_found_without_a_config(
    run: Run, tmp_path: Path, run_tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    crops, gallery, query = tmp_path / "crops", tmp_path / "people", tmp_path / "query.jpg"
    for number, path in enumerate(run.test_set.gallery_paths[:6]):
        folder = crops / f"door{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{number}.jpg")
    (crops / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    shutil.copy(run.test_set.query_paths[0], query)
    assert run_tool("build", gallery, crops, "--model", run.folder, "--camera-folders") == 0
    told = capsys.readouterr()
    assert "6 added, 1 unreadable" in told.out
    assert "broken.jpg" in told.out + told.err
    assert [path.name for path in gallery.iterdir()] == [FILE]

    predictor = Predictor(run.folder)
    stored = read_gallery(gallery)
    assert stored.origin.fingerprint == predictor.fingerprint
    assert stored.origin.weights_sha256 == predictor.card.weights_sha256
    assert stored.origin.weights_named
    assert sorted(stored.cameras) == ["door0", "door1"]
    expected = predictor([*stored.paths])
    np.testing.assert_allclose(stored.features, expected, atol=1e-6)

    answers = tmp_path / "found.json"
    assert run_tool("query", gallery, query, "--top", 6, "--json", answers) == 0
    found = json.loads(answers.read_text())["queries"][0]["answers"]
    similarity = predictor(query) @ expected.T
    order = np.argsort(-similarity[0])
    assert [answer["path"] for answer in found] == [stored.paths[row] for row in order]
    assert [answer["similarity"] for answer in found] == pytest.approx(
        similarity[0][order].tolist(), abs=1e-6
    )

    other = tmp_path / "other.yaml"
    text = (run.folder / "config.yaml").read_text()
    other.write_text(text.replace("FLIP: true", "FLIP: false"))
    capsys.readouterr()
    assert run_tool("query", gallery, query, "--model", other, "--weights", run.weights) == 2
    told_error = capsys.readouterr().err.splitlines()[-1]
    assert told_error.startswith("ConfigError: ")
    assert predictor.fingerprint[:16] in told_error
    assert "cannot be compared" in told_error
