from __future__ import annotations

import csv
import os
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from reid.data.datasets import CSV, Folder
from reid.data.datasets.base import ReIDDataset, Split
from reid.data.export import export_crops
from reid.structures import DataError, ImageRecord

TOOL = Path(__file__).parents[2] / "tools" / "export_crops.py"


class Listed(ReIDDataset):
    """A dataset of given images."""

    name = "Listed"

    def __init__(self, splits: dict[Split, list[ImageRecord]]) -> None:
        super().__init__()
        self._splits = splits

    def load(self, split: Split) -> list[ImageRecord]:
        return self._splits[split]

    def has_test(self) -> bool:
        return "query" in self._splits


@pytest.fixture
def images(tmp_path: Path) -> dict[Split, list[ImageRecord]]:
    """Each image has a grey level of its own; no image is of camera 1."""
    splits: dict[Split, list[tuple[int, int]]] = {
        "train": [(1, 0), (1, 2), (2, 0), (2, 10)],
        "query": [(7, 0), (8, 2)],
        "gallery": [(7, 10), (8, 0)],
    }
    found: dict[Split, list[ImageRecord]] = {}
    level = 0
    for split, labels in splits.items():
        found[split] = []
        for pid, camid in labels:
            level += 10
            path = tmp_path / f"{pid}_{camid}_{split}.PNG"
            Image.new("L", (4, 8), level).save(path)
            found[split].append(ImageRecord(str(path), pid, camid))
    return found


def test_training_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: dict[Split, list[ImageRecord]]
) -> None:
    text = export_crops(Listed({"train": images["train"]}), tmp_path / "new" / "shop")
    assert text.endswith("shop: 4 images of 3 cameras")
    monkeypatch.setenv("REID_DATASETS", str(tmp_path / "new"))
    folder = Folder("shop")
    records = folder.load("train")
    assert folder.cameras == ("camera1", "camera3", "camera11")
    assert [record.camid for record in records] == [0, 0, 2, 1]  # paths in plain order
    assert records[2].extra == {"camera": "camera11"}
    assert {record.pid for record in records} == {-1}
    assert sorted(Path(record.path).name for record in records) == [
        f"00000{i}.png" for i in range(4)
    ]
    with pytest.raises(DataError, match="is there already"):
        export_crops(Listed(images), tmp_path / "new" / "shop")
    with pytest.raises(DataError, match="Listed: has no query and gallery to label"):
        export_crops(Listed({"train": images["train"]}), tmp_path / "other", labelled=True)


def test_labels_lie_beside_the_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: dict[Split, list[ImageRecord]]
) -> None:
    text = export_crops(Listed(images), tmp_path / "shop", labelled=True)
    assert "8 images of 3 cameras, 4 of them labelled in" in text
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    by_path = {record.path: record for record in Folder("shop").load("train")}
    assert len(by_path) == 8
    labels = CSV("shop/labels.csv")
    assert labels.name == "shop"  # the folder's name, so that a model knows the cameras
    for split in ("query", "gallery"):
        records = labels.load(split)  # type: ignore[arg-type]
        before = images[split]  # type: ignore[index]
        assert sorted(record.pid for record in records) == sorted(record.pid for record in before)
        levels = {Image.open(one.path).getpixel((0, 0)): one.pid for one in before}
        for record in records:
            assert by_path[record.path].camid == record.camid
            with Image.open(record.path) as image:
                assert levels[image.getpixel((0, 0))] == record.pid


def test_cameras_that_are_not_known(tmp_path: Path, images: dict[Split, list[ImageRecord]]) -> None:
    train = [ImageRecord(record.path, record.pid) for record in images["train"]]
    text = export_crops(Listed({"train": train}), tmp_path / "shop")
    assert text.endswith("4 images of no cameras")
    assert len(list((tmp_path / "shop").glob("*.png"))) == 4
    with pytest.raises(DataError, match="some cameras are known and others not"):
        export_crops(Listed({"train": [*train, *images["train"]]}), tmp_path / "other")


def test_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path / "data"))
    small = ("NUM_TRAIN", "3", "NUM_TEST", "2", "NUM_CAMERAS", "2", "NUM_DISTRACTORS", "1")
    arguments = [str(tmp_path / "shop"), "SyntheticPersons", *small, "--labelled"]

    def run() -> int:
        monkeypatch.setattr(sys, "argv", ["export_crops.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        return int(stop.value.code or 0)

    assert run() == 0
    assert "labelled in" in capsys.readouterr().out
    with (tmp_path / "shop" / "labels.csv").open(newline="") as stream:
        assert {row["split"] for row in csv.DictReader(stream)} == {"query", "gallery"}
    assert run() == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_only_regular_files_are_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name, kind in (("pipe", "pipe"), ("zero", "device")):
        dataset = Listed({"train": [ImageRecord(str(tmp_path / f"{name}.jpg"), 1, 0)]})
        with pytest.raises(DataError, match=rf"{name}\.jpg: cannot be copied .*is a {kind}, exp"):
            export_crops(dataset, tmp_path / name)
