from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from reid.data.datasets import Market1501, SplitCounts
from reid.data.images import read_image
from reid.structures import DataError

TRAIN = ["0007_c2s3_000001_01.jpg", "0002_c1s1_000451_03.jpg", "0002_c1s1_000551_01.jpg"]
QUERY = ["0001_c6s1_000001_00.jpg"]
GALLERY = [
    "-1_c1s1_000401_03.jpg", "-1_c4s2_000401_03.jpg", "0000_c3s1_000151_01.jpg",
    "0000_c3s1_000151_02.jpg", "0001_c1s1_001051_00.jpg",
]  # fmt: skip


@pytest.fixture(params=["Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501"])
def market(plant: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    folder = str(request.param)
    plant(f"{folder}/bounding_box_train", [*TRAIN, "Thumbs.db", ".0002_c1s1_000451_03.jpg"])
    plant(f"{folder}/query", [*QUERY, "Thumbs.db"])
    plant(f"{folder}/bounding_box_test", [*GALLERY, "Thumbs.db"])
    return plant(folder, ["readme.txt"])


def test_splits_keep_distractors_and_junk_apart(market: Path) -> None:
    dataset = Market1501()
    train = dataset.load("train")
    assert [Path(record.path) for record in train] == [
        market / "bounding_box_train" / name for name in sorted(TRAIN)
    ]
    assert [(r.pid, r.camid) for r in train] == [(2, 0), (2, 0), (7, 1)]
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(1, 5)]
    gallery = dataset.load("gallery")
    assert [(r.pid, r.camid) for r in gallery] == [(-1, 0), (-1, 3), (0, 2), (0, 2), (1, 0)]
    assert SplitCounts.of(gallery) == SplitCounts(identities=2, images=5, cameras=3)


@pytest.mark.parametrize("place", ["images", "distractors_500k", "distractors_500k/images"])
def test_half_a_million_distractors(
    market: Path, plant: Callable[..., Path], root: Path, place: str
) -> None:
    names = ["0000_c2s1_000001_01.jpg", "-1_c2s1_000001_02.jpg", "1502_c5s1_1.jpg", "x17.jpg"]
    folder = plant(str(market.relative_to(root) / place), [*names, "Thumbs.db"])
    dataset = Market1501(distractors_500k=True)
    assert dataset.name == "Market1501+500k"
    gallery = dataset.load("gallery")
    assert [(Path(r.path).name, r.pid, r.camid) for r in gallery[5:]] == [
        ("0000_c2s1_000001_01.jpg", 0, 1),
        ("1502_c5s1_1.jpg", 0, 4),
        ("x17.jpg", 0, -1),
    ]
    assert Path(gallery[-1].path).parent == folder
    assert len(dataset.load("query")) == 1
    assert len(Market1501().load("gallery")) == 5
    assert dataset.published()["gallery"].images is None


def test_distractors_that_are_not_there(market: Path) -> None:
    with pytest.raises(DataError, match=r"DISTRACTORS_500K is set, but there is no images/"):
        Market1501(distractors_500k=True).load("gallery")


def test_published_counts() -> None:
    published = Market1501().published()
    assert published["gallery"] == SplitCounts(identities=751, images=19732, cameras=6)
    assert {split: counts.images for split, counts in published.items()} == {
        "train": 12936, "query": 3368, "gallery": 19732,
    }  # fmt: skip


def test_a_name_that_does_not_parse(plant: Callable[..., Path]) -> None:
    plant("Market-1501-v15.09.15/query", ["holiday.jpg"])
    with pytest.raises(DataError, match=r"holiday\.jpg: the name does not tell"):
        Market1501().load("query")


def test_an_empty_split(root: Path) -> None:
    folder = root / "Market-1501-v15.09.15" / "query"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=f"{folder}: no image found"):
        Market1501().load("query")


def test_pictures_of_other_suffixes(market: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = market / "bounding_box_train"
    for name in ("0009_c1s1_1.jfif", "0010_c1s1_1"):
        Image.new("RGB", (8, 16)).save(folder / name, "JPEG")
    (folder / "0011_c1s1_1.jxl").touch()
    names = [Path(record.path).name for record in Market1501().load("train")]
    assert names == sorted([*TRAIN, "0009_c1s1_1.jfif", "0010_c1s1_1"])
    assert "JPEG XL pictures, which are not read (convert to JPEG or PNG): 1 ('0011" in caplog.text
    (folder / "0011_c5s1_1.jxl").touch()
    with pytest.raises(DataError, match=r"train: camera '5' has no image that is read, but 1 JPEG"):
        Market1501().load("train")


@pytest.mark.skipif(os.name == "nt", reason="makes pipes")
def test_a_pipe_among_the_images_is_an_error_when_read(market: Path) -> None:
    os.mkfifo(market / "bounding_box_train" / "0009_c1s1_1.jpg")
    last = Market1501().load("train")[-1]
    with pytest.raises(DataError, match=r"0009_c1s1_1\.jpg: is not .* \(is a pipe, expected a"):
        read_image(last.path)


def test_a_copy_with_training_images_only(plant: Callable[..., Path]) -> None:
    folder = plant("Market-1501-v15.09.15/bounding_box_train", TRAIN).parent
    dataset = Market1501()
    assert dataset.has_train()
    assert not dataset.has_test()
    assert dataset.missing_splits() == {
        "query": folder / "query", "gallery": folder / "bounding_box_test",
    }  # fmt: skip
    plant("Market-1501-v15.09.15/query", QUERY)
    assert not dataset.has_test()
    plant("Market-1501-v15.09.15/bounding_box_test", GALLERY)
    assert dataset.has_test()
    assert not dataset.missing_splits()


def test_no_folder_at_all(root: Path) -> None:
    with pytest.raises(DataError, match=rf"there is no folder {root}/Market-1501-v15\.09\.15"):
        Market1501().has_test()
