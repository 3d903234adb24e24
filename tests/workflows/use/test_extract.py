"""Features of many images in one file, which evaluation and pictures read."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from reid.evaluation.feature_files import load_features
from reid.evaluation.feature_rows import FeatureRows, read_feature_rows, write_feature_rows
from reid.evaluation.report import evaluate_file
from reid.locks import locked
from reid.registry import ConfigError
from reid.structures import DataError
from reid.workflows import extract as extraction
from reid.workflows.extract import extract
from reid.workflows.extraction_lists import list_dataset, list_paths
from reid.workflows.predict import Predictor
from reid.workflows.runtime import TorchNetwork

if TYPE_CHECKING:
    from tests.workflows.use.conftest import Run

ROOT = Path(__file__).parents[3]
TOOL = str(ROOT / "tools" / "extract.py")
PERSONS = ["SyntheticPersons", "NUM_TRAIN", "8", "NUM_TEST", "6", "NUM_CAMERAS", "3",
           "NUM_DISTRACTORS", "3", "HEIGHT", "40", "WIDTH", "20"]  # fmt: skip


@pytest.fixture(scope="module")
def predictor(run: Run) -> Predictor:
    return Predictor(run.folder)


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    """Twenty crops in folders, two of them broken, and a file that is no picture."""
    folder = tmp_path / "crops"
    for number in range(20):
        path = folder / ("east", "west", "odd")[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (40 + number, 20, 3), np.uint8)
        Image.fromarray(noise).save(path)
    for name in ("east/03.png", "west/10.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "notes.txt").write_text("no picture")
    return folder


def tool(*arguments: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["extract.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(TOOL, run_name="__main__")
    return int(stop.value.code or 0)


def same_rows(one: FeatureRows, other: FeatureRows) -> bool:
    return np.array_equal(one.features, other.features) and all(
        list(getattr(one, name)) == list(getattr(other, name))
        for name in ("paths", "cameras", "splits", "pids", "camids")
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_data_set_gives_the_figures_of_the_evaluation(
    run: Run, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"test{suffix}"
    assert (
        tool("--model", run.folder, "--output", output, "--workers", 0, "--dataset", *PERSONS) == 0
    )
    count = len(run.query) + len(run.gallery)
    assert f"{output}: {count} features of 24 numbers" in capsys.readouterr().out
    rows = read_feature_rows(output)
    expected = torch.cat((run.query.test, run.gallery.test)).numpy()
    np.testing.assert_allclose(rows.features, expected, atol=1e-6, rtol=0)
    assert rows.paths == [*run.test_set.query_paths, *run.test_set.gallery_paths]
    assert rows.pids.tolist() == torch.cat((run.query.pids, run.gallery.pids)).tolist()
    assert rows.camids.tolist() == torch.cat((run.query.camids, run.gallery.camids)).tolist()
    assert rows.splits == ["query"] * len(run.query) + ["gallery"] * len(run.gallery)
    (last,) = json.loads((run.folder / "results.json").read_text())["final"]
    assert evaluate_file(output)["numbers"] == pytest.approx(last["numbers"], abs=1e-6)
    query, gallery, query_paths, _ = load_features(output)
    assert torch.allclose(query.test, run.query.test, atol=1e-6)
    assert len(gallery) == len(run.gallery)
    assert query_paths == run.test_set.query_paths
    provenance = rows.provenance
    assert provenance["fingerprint"] == Predictor(run.folder).fingerprint
    assert provenance["flip"] is True
    assert provenance["precision"] == "fp32"
    assert provenance["weights"] == "model_best.safetensors"
    assert provenance["unreadable"] == []


def test_files_are_read_by_any_code(predictor: Predictor, crops: Path, tmp_path: Path) -> None:
    images = list_paths([crops / "odd"], predictor.card)
    for name in ("a.npz", "a.safetensors"):
        extract(predictor, images, tmp_path / name)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["paths"].tolist() == [record.path for record in images.records]
        assert arrays["features"].dtype == np.float32
        assert json.loads(str(arrays["provenance"]))["images"] == "odd"
    tensors = load_file(tmp_path / "a.safetensors")
    assert json.loads(tensors["paths"].tobytes()) == [record.path for record in images.records]
    one, other = (read_feature_rows(tmp_path / name) for name in ("a.npz", "a.safetensors"))
    assert same_rows(one, other)
    with pytest.raises(DataError, match="its splits are none"):
        load_features(tmp_path / "a.npz")
    everything = load_features(tmp_path / "a.npz", any_split=True)
    assert (len(everything.query), len(everything.gallery)) == (len(images.records), 0)


def test_pictures_are_drawn_of_an_unlabelled_folder(
    predictor: Predictor, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = list_paths([crops / "odd", crops / "east"], predictor.card)
    extract(predictor, images, tmp_path / "a.npz")
    command = ["visualize.py", "embed", "--features", str(tmp_path / "a.npz"), "--colour", "camera",
               "--output", str(tmp_path / "a.png")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "visualize.py"), run_name="__main__")
    assert not stop.value.code
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_unreadable_images_are_counted_and_named(
    run: Run, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.npz"
    assert tool(crops, "--model", run.folder, "--output", output, "--workers", 0) == 0
    text = capsys.readouterr().out
    assert "18 features of 24 numbers" in text
    assert "2 images could not be read and are left out:" in text
    assert "crops/east/03.png: is not a readable image" in text
    rows = read_feature_rows(output)
    assert [Path(path).name for path, _ in rows.provenance["unreadable"]] == ["03.png", "10.png"]
    assert len(rows) == 18
    predictor = Predictor(run.folder)
    np.testing.assert_allclose(rows.features, predictor(rows.paths), atol=1e-6, rtol=0)
    assert set(rows.cameras) == {""}
    assert set(rows.pids.tolist()) == set(rows.camids.tolist()) == {-1}


def test_nothing_readable_is_an_error(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(DataError, match="none of 1 images can be read"):
        extract(predictor, list_paths([tmp_path / "a.png"], predictor.card), tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def test_folders_may_be_cameras(
    predictor: Predictor, crops: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = predictor.card.cameras
    assert known is not None
    assert known[0] is not None
    (crops / "east").rename(crops / known[0][1])
    with caplog.at_level("INFO", "reid"):
        images = list_paths([crops], predictor.card, camera_folders=True)
    assert "The model has not learned 2 of 3 cameras (odd, west)" in caplog.text
    pairs = zip(images.records, images.seen, strict=True)
    first = {record.path.split("/")[-2]: seen for record, seen in pairs}
    assert (first[known[0][1]].camid, first["odd"].camid) == (0, -1)
    extract(predictor, images, tmp_path / "a.npz")
    rows = read_feature_rows(tmp_path / "a.npz")
    assert set(rows.cameras) == {known[0][1], "odd", "west"}
    assert set(rows.camids.tolist()) == {0, 1, 2}
    row = rows.cameras.index(known[0][1])
    np.testing.assert_allclose(
        rows.features[row], predictor(rows.paths[row], known[0][1])[0], atol=1e-6, rtol=0
    )


def test_lists_and_single_pictures(predictor: Predictor, crops: Path, tmp_path: Path) -> None:
    (crops / "some.txt").write_text("odd/02.png\n\nwest/01.png\n")
    images = list_paths([crops / "some.txt", crops / "odd" / "05.png"], predictor.card)
    assert [Path(record.path).name for record in images.records] == ["02.png", "01.png", "05.png"]
    (crops / "list.csv").write_text(
        "path,pid,camid,split\nodd/02.png,7,gate,query\nwest/01.png,7,door,gallery\n"
        "odd/05.png,,,gallery\nodd/08.png,8,door,gallery\n"
    )
    images = list_paths([crops / "list.csv"], predictor.card)
    assert images.cameras == ["gate", "door", "", "door"]
    assert images.splits == ["query", "gallery", "gallery", "gallery"]
    assert [record.pid for record in images.records] == [7, 7, -1, 8]
    extract(predictor, images, tmp_path / "l.npz")
    assert evaluate_file(tmp_path / "l.npz")["numbers"]["mAP"] in (0.5, 1)
    with pytest.raises(ConfigError, match="pass a list with cameras and identities alone"):
        list_paths([crops / "list.csv", crops], predictor.card)
    for path, message in ((tmp_path / "gone", "no such file"), (tmp_path / "empty", "no image")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=message):
            list_paths([path], predictor.card)


def test_splits_of_a_data_set(predictor: Predictor) -> None:
    train = list_dataset(PERSONS, predictor.card, ["train"])
    assert set(train.splits) == {"train"}
    assert train.cameras[0] in {camera[1] for camera in predictor.card.cameras or () if camera}
    assert {record.camid for record in train.seen} == {0, 1, 2}


class Stop(Exception):  # noqa: N818
    """In place of a power cut."""


def test_it_goes_on_where_it_stopped_with_the_same_bits(
    run: Run, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(run.folder, batch_size=3)
    images = list_paths([crops], predictor.card)
    whole = tmp_path / "whole.npz"
    extract(predictor, images, whole)
    monkeypatch.setattr(extraction, "_SAVE_EVERY_S", 0.0)
    output, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    network = predictor.network
    calls = 0

    def stopping(after: int) -> Callable[..., Any]:
        def run_network(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Stop
            return network(*arguments)

        return run_network

    for after in (2, 1, 0, 3):  # batches done, then a cut
        calls = 0
        monkeypatch.setattr(predictor, "network", stopping(after))
        with pytest.raises(Stop):
            extract(predictor, images, output)
        assert not output.exists()
        with (parts / "done.jsonl").open("a") as journal:
            journal.write('{"done": 99')  # of a line that was cut off
        cut = (parts / "done.jsonl").read_text().rpartition("\n")[0]
        (parts / "done.jsonl").write_text(cut + "\n" if after else cut + '\n{"do')
    monkeypatch.setattr(predictor, "network", network)
    found = extract(predictor, images, output)
    assert found.resumed == 18
    assert str(found).startswith(f"{output}: 18 features of 24 numbers; 18 images were done before")
    assert not parts.exists()
    assert same_rows(read_feature_rows(output), read_feature_rows(whole))
    assert [path for path, _ in found.unreadable] == [
        path for path, _ in read_feature_rows(whole).provenance["unreadable"]
    ]


def test_parts_of_another_extraction_are_refused(
    run: Run, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(run.folder, batch_size=3)
    images = list_paths([crops], predictor.card)
    output = tmp_path / "a.npz"

    def cut(*arguments: Any) -> Any:
        raise Stop

    network = predictor.network
    monkeypatch.setattr(predictor, "network", cut)
    with pytest.raises(Stop):
        extract(predictor, images, output)
    monkeypatch.setattr(predictor, "network", network)
    other = Predictor(run.folder, batch_size=4)
    with pytest.raises(ConfigError, match=r"a\.npz\.parts: holds the beginning of an extraction"):
        extract(other, images, output)
    extract(other, images, output, overwrite=True)
    with pytest.raises(ConfigError, match="is there already; choose another name"):
        extract(other, images, output)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.npz: expected the name of a file, but"):
        extract(other, images, tmp_path / "folder.npz", overwrite=True)
    assert not (tmp_path / "folder.npz.parts").exists()
    with pytest.raises(ConfigError, match=r"expected a file name that ends in \.npz or"):
        extract(other, images, tmp_path / "a.csv")


def test_ctrl_c_keeps_what_is_done(
    run: Run,
    crops: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "a.npz"
    command = [crops, "--model", run.folder, "--output", output, "--workers", 0, "--batch-size", 3]
    computed = TorchNetwork.__call__
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return computed(*arguments)

    monkeypatch.setattr(TorchNetwork, "__call__", interrupted)
    assert tool(*command) == 130
    assert "SIGINT has ended the run; the same command goes on" in capsys.readouterr().err
    done = json.loads((tmp_path / "a.npz.parts" / "done.jsonl").read_text())["done"]
    assert done == 9
    assert tool(*command) == 0
    assert "18 features of 24 numbers; 9 images were done before" in capsys.readouterr().out
    assert not (tmp_path / "a.npz.parts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "a.npz"], "expected either paths or --dataset"),
        (["x", "--output", "a.npz", "--dataset", "CSV"], "expected either paths or --dataset"),
        (["x", "--output", "a.npz"], "there is no such file or folder"),
        (["--output", "a.npz", "--dataset", "Market1502"], "did you mean 'Market1501'"),
        (["x", "--output", "a.npz", "--precision", "fp8"], "test.precision"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert tool(*arguments, "--model", run.folder) == 2 if "--dataset" not in arguments else True
    if "--dataset" in arguments:
        assert tool("--model", run.folder, *arguments) == 2
    assert message in capsys.readouterr().err


def rows(**changes: Any) -> FeatureRows:
    ids = np.array([0, 1], np.int64)
    given: dict[str, Any] = {
        "features": np.eye(2, 3, dtype=np.float32), "paths": ["a", "b\udc80"], "cameras": ["", "x"],
        "splits": ["", ""], "pids": ids, "camids": ids, "provenance": {"fingerprint": "f"},
    }  # fmt: skip
    return FeatureRows(**given | changes)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_broken_files_are_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_feature_rows(path, rows())
    assert same_rows(read_feature_rows(path), rows())
    assert read_feature_rows(path).fingerprint == "f"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=name):
        read_feature_rows(path)
    write_feature_rows(path, rows(features=np.full((2, 3), np.nan, np.float32)))
    with pytest.raises(DataError, match="not finite, first in row=0"):
        read_feature_rows(path)
    with pytest.raises(ValueError, match="paths: expected 2, one for each feature, got 1"):
        rows(paths=["a"])
    with pytest.raises(ValueError, match="expected a file name that ends in"):
        write_feature_rows(tmp_path / "a.csv", rows())


def test_overwriting_leaves_an_extraction_that_works_alone(
    predictor: Predictor, crops: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.npz"
    parts = tmp_path / "a.npz.parts"
    with locked(parts):
        (parts / "job.txt").write_text("of another process")
        with pytest.raises(ConfigError, match=r"a\.npz: .* is in use by process"):
            extract(predictor, list_paths([crops], predictor.card), output, overwrite=True)
        assert (parts / "job.txt").read_text() == "of another process"
