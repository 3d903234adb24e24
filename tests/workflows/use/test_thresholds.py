"""tools/thresholds.py: measured, stored beside the weights, found by the Predictor."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reid.evaluation.thresholds import ThresholdRow, Thresholds
from reid.structures import DataError
from reid.workflows.predict import Predictor
from reid.workflows.thresholds import load_thresholds, save_thresholds, thresholds_path

if TYPE_CHECKING:
    from tests.workflows.use.conftest import Run

TOOLS = Path(__file__).parents[3] / "tools"
PERSONS = ["SyntheticPersons", "NUM_TRAIN", "8", "NUM_TEST", "6", "NUM_CAMERAS", "3",
           "NUM_DISTRACTORS", "3", "HEIGHT", "40", "WIDTH", "20"]  # fmt: skip
TABLE = Thresholds("pairs", "shop", 3, 4, [ThresholdRow(0.5, 100.0, 0.9)])


def tool(name: str, *arguments: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
    return int(stop.value.code or 0)


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """A run of its own, to which thresholds may be added."""
    copied = tmp_path / "run"
    copied.mkdir()
    for name in ("config.yaml", "model_best.safetensors"):
        shutil.copy(run.folder / name, copied / name)
    return copied


def test_the_test_set_of_the_run_gives_thresholds(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Predictor(folder).thresholds is None
    assert tool("thresholds.py", "--model", folder, "--show") == 2
    assert "has no thresholds yet" in capsys.readouterr().err
    assert tool("thresholds.py", "--model", folder) == 0
    text = capsys.readouterr().out
    assert "Same person or not, from labelled pairs" in text
    assert "SyntheticPersons, 16 against 40 images" in text
    assert f"Written to {folder}/model_best.thresholds.json" in text
    predictor = Predictor(folder)
    assert predictor.thresholds is not None
    assert str(predictor.thresholds) in text
    assert tool("thresholds.py", "--model", folder, "--show") == 0
    assert capsys.readouterr().out.strip().endswith(str(predictor.thresholds))
    matches = (run.query.pids[:, None] == run.gallery.pids) & (
        run.query.camids[:, None] != run.gallery.camids
    )
    assert predictor.thresholds.same_pairs == int(matches.sum())


def test_extracted_features_give_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tmp_path / "f.npz"
    options = ["--model", folder, "--workers", 0]
    assert tool("extract.py", *options, "--output", features, "--dataset", *PERSONS) == 0
    assert tool("thresholds.py", *options, "--features", features) == 0
    by_features = Predictor(folder).thresholds
    assert tool("thresholds.py", *options, "--dataset", *PERSONS) == 0
    by_dataset = Predictor(folder).thresholds
    assert by_features is not None
    assert by_dataset is not None
    assert by_features.rows == by_dataset.rows
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("FLIP: true", "FLIP: false"))
    capsys.readouterr()
    assert tool("thresholds.py", *options, "--features", features) == 2
    assert "f.npz: its features come from another model" in capsys.readouterr().err


def test_clusters_stand_in_where_nothing_is_labelled(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", folder, "--workers", 0]
    assert tool("thresholds.py", *options, "--clusters") == 2
    assert "clusterer: nothing is labelled, and the config has none" in capsys.readouterr().err
    config = folder / "config.yaml"
    clusterer = "CLUSTERER: {NAME: KMeans, NUM_CLUSTERS: 2}"
    config.write_text(config.read_text().replace("CLUSTERER: null", clusterer))
    assert tool("thresholds.py", *options, "--clusters") == 0
    told = capsys.readouterr().out
    assert "from clusters, since nothing is labelled" in told
    assert "the true figures are worse" in told
    found = Predictor(folder).thresholds
    assert found is not None
    assert found.source == "clusters"
    assert found.data == "SyntheticPersons, 66 against 66 images"


def test_thresholds_belong_to_their_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / "model.onnx"
    assert load_thresholds(weights, "a") is None
    assert save_thresholds(weights, "a", TABLE) == tmp_path / "model.thresholds.json"
    assert load_thresholds(weights, "a") == TABLE
    assert load_thresholds(weights, "b") is None
    assert "model.thresholds.json: belongs to another model than model.onnx" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["thresholds"].update(rows=[]),
        lambda content: content["thresholds"]["rows"][0].update(similarity=3),
        lambda content: content["thresholds"].update(same_pairs=-1),
        lambda content: content["thresholds"].update(source="guess"),
        lambda content: content.pop("fingerprint"),
        lambda content: content.update(thresholds=3),
        lambda content: content["thresholds"].update(rows=[3]),
        lambda content: content.update(format=2),
        lambda content: content["thresholds"].update(rows=2 * content["thresholds"]["rows"]),
    ],
)
def test_broken_files_are_told(tmp_path: Path, change: Any) -> None:
    weights = tmp_path / "model.safetensors"
    path = save_thresholds(weights, "a", TABLE)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"model\.thresholds\.json: is no file of thresholds"):
        load_thresholds(weights, "a")
    thresholds_path(weights).write_text("{")
    with pytest.raises(DataError, match=r"tools/thresholds\.py"):
        load_thresholds(weights, "a")


def test_names_of_any_bytes_come_back_readable(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    save_thresholds(weights, "a", replace(TABLE, data="sh\udcffp\n, 3 images"))
    found = load_thresholds(weights, "a")
    assert found is not None
    assert found.data == "sh\\xffp\\n, 3 images"


def test_a_broken_file_stops_nobody_who_needs_it_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "model_best.thresholds.json"
    path.write_text("{")
    assert tool("thresholds.py", "--model", folder, "--show") == 2
    assert "make it anew with tools/thresholds.py" in capsys.readouterr().err
    assert tool("thresholds.py", "--model", folder, "--workers", 0) == 0
    assert Predictor(folder).thresholds is not None
