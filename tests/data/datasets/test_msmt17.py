from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reid.data.check_report import check_dataset, load_splits
from reid.data.datasets import MSMT17
from reid.structures import DataError


@pytest.mark.parametrize("parent", ["", "msmt17/", "MSMT17/"])
@pytest.mark.parametrize(
    ("version", "train", "test"),
    [("MSMT17_V1", "train", "test"), ("MSMT17_V2", "mask_train_v2", "mask_test_v2")],
)
def test_lists(
    plant: Callable[..., Path], parent: str, version: str, train: str, test: str
) -> None:
    folder = parent + version
    lists = {
        "list_train.txt": (train, "0000/0000_000_01_0303morning_0015_0.jpg", 0),
        "list_val.txt": (train, "0003/0003_001_15_0303morning_0015_1.jpg", 3),
        "list_query.txt": (test, "0000/0000_000_02_0303morning_0015_0.jpg", 0),
        "list_gallery.txt": (test, "0000/0000_001_14_0303noon_0001_0.jpg", 0),
    }
    for name, (images, path, pid) in lists.items():
        plant(f"{folder}/{images}", [path])
        (plant(folder, [name]) / name).write_text(f"{path} {pid}\n")
    dataset = MSMT17()
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(0, 0), (3, 14)]
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(0, 1)]
    assert [(r.pid, r.camid) for r in dataset.load("gallery")] == [(0, 13)]
    assert dataset.version == version
    assert dataset.published()["train"].images == 32621
    # identity 0 in training is another person than identity 0 in the test
    report = check_dataset(dataset, load_splits(dataset), images=False)
    assert "shared-identity" not in {finding["kind"] for finding in report["findings"]}
    without = MSMT17(with_val=False)
    assert [(r.pid, r.camid) for r in without.load("train")] == [(0, 0)]
    assert [(r.pid, r.camid) for r in without.load("query")] == [(0, 1)]
    assert [(r.pid, r.camid) for r in without.load("gallery")] == [(0, 13)]
    assert without.published()["train"].images == 30248


def test_market_folders(plant: Callable[..., Path]) -> None:
    plant("MSMT17/bounding_box_train", ["0000_c15_0001.jpg"])
    dataset = MSMT17()
    assert dataset.version == ""
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(0, 14)]
    assert dataset.version == "MSMT17, in Market-1501's layout"
    with pytest.raises(DataError, match="with_val: false needs the lists"):
        MSMT17(with_val=False).load("train")
    with pytest.raises(DataError, match=r"there is no test/, mask_test_v2/ or query/"):
        MSMT17().load("query")


def test_one_of_two_versions(plant: Callable[..., Path]) -> None:
    for version, images in (("V1", "train"), ("V2", "mask_train_v2")):
        path = f"0000/0000_000_01_{version}.jpg"
        plant(f"MSMT17_{version}/{images}", [path])
        for name in ("list_train.txt", "list_val.txt"):
            (plant(f"MSMT17_{version}", [name]) / name).write_text(f"{path} 0\n")
    for wanted, found in (("", "MSMT17_V1"), ("V1", "MSMT17_V1"), ("V2", "MSMT17_V2")):
        dataset = MSMT17(version=wanted)  # type: ignore[arg-type]
        assert f"/{found}/" in dataset.load("train")[0].path
        assert dataset.version == found


def test_a_version_that_is_not_there(plant: Callable[..., Path]) -> None:
    plant("msmt17/train", ["0000/0000_000_01_0.jpg"])
    with pytest.raises(DataError, match="holds MSMT17_V1, but datasets asks for version V2"):
        MSMT17(version="V2").load("train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0000.jpg 0", "does not parse"),
        ("0/0000_000_01_x.jpg", "does not parse"),
        ("0/0000_000_00_x.jpg 0", "does not parse"),
        ("0/0000_000_01_x.jpg -1", "does not parse"),
        ("../0000_000_01_x.jpg 0", "leaves the folder"),
        ("/0/0000_000_01_x.jpg 0", "leaves the folder"),
    ],
)
def test_a_line_that_is_wrong(plant: Callable[..., Path], line: str, message: str) -> None:
    plant("MSMT17_V1/train", ["0/0000_000_01_x.jpg"])
    (plant("MSMT17_V1", []) / "list_train.txt").write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=rf"list_train\.txt, line 2: .* {message}"):
        MSMT17().load("train")


def test_lists_and_images_that_are_missing(plant: Callable[..., Path]) -> None:
    plant("MSMT17_V1/train", ["0/0000_000_01_x.jpg"])
    with pytest.raises(DataError, match=r"list_train\.txt: there is no such list"):
        MSMT17().load("train")
    (plant("MSMT17_V1", []) / "list_train.txt").write_text("1/0001_000_01_x.jpg 1\n")
    with pytest.raises(
        DataError, match=r"0001_000_01_x\.jpg: there is no such image, but .*list_train"
    ):
        MSMT17().load("train")
    (plant("MSMT17_V1", []) / "list_train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"list_train\.txt: is not UTF-8 text"):
        MSMT17().load("train")


def test_a_missing_folder_says_where_to_put_it(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        MSMT17().load("train")
    message = str(caught.value)
    assert str(root / "MSMT17_V1") in message
    assert "list_train.txt" in message
    assert f"REID_DATASETS is {str(root)!r}" in message
