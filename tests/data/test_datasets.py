from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from reid.data.datasets import (
    CSV,
    Market1501,
    SplitCounts,
    SyntheticPersons,
)
from reid.data.datasets.base import join_below
from reid.structures import DataError, ImageRecord


def touch(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8)).save(folder / name)


def ids(records: list[ImageRecord]) -> list[tuple[int, int]]:
    return [(record.pid, record.camid) for record in records]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    return tmp_path


def test_counts_leave_out_junk_and_unknown_cameras() -> None:
    records = [
        ImageRecord("a", -1, 0),
        ImageRecord("b", 0, 2),
        ImageRecord("c", 7, 2),
        ImageRecord("d", 7, -1),
    ]
    assert SplitCounts.of(records) == SplitCounts(identities=2, images=4, cameras=2)


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REID_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="REID_DATASETS is not set, so datasets lie in datasets/"):
        Market1501().load("train")


def test_csv(root: Path) -> None:
    folder = root / "own"
    touch(folder, ["a/1.png", "2.png", "3.png", "4.png"])
    (folder / "list.csv").write_text(
        "path,pid,camid,split\na/1.png,3,0,train\n2.png,,,train\n3.png,1,0,query\n4.png,1,2,gallery\n",
        "utf-8-sig",
    )
    dataset = CSV("own/list.csv")
    assert dataset.name == "own"
    assert dataset.has_test()
    train = dataset.load("train")
    assert ids(train) == [(3, 0), (-1, -1)]
    assert train[0].path == str(folder / "a" / "1.png")
    assert ids(CSV("own/list.csv", train_split="gallery").load("train")) == [(1, 2)]


def test_csv_with_paths_only(root: Path) -> None:
    touch(root, ["1.png"])
    (root / "list.csv").write_text("path\n1.png\n")
    dataset = CSV("list.csv")
    assert dataset.name == "list"
    assert ids(dataset.load("train")) == [(-1, -1)]
    assert not dataset.has_test()
    with pytest.raises(DataError, match="no image of the split 'query'; splits in the file: train"):
        dataset.load("query")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,person\n1.png,2\n", "the header is path,person"),
        ("", "the header is missing"),
        ("path,pid\n1.png,x\n1.png,y\n", "with identity 0 and again with 1; an image shows one"),
        ("path,camid\n1.png,-2\n", "line 2: camid is '-2'"),
        ("path,pid\n1.png,²\n", "line 2: pid is '²'"),
        ("path,pid\n1.png\n", "line 2: has more or fewer fields"),
        ("path,pid\n1.png,1,2\n", "line 2: has more or fewer fields"),
        ("path,pid\n,1\n", "line 2: has more or fewer fields than the header, or no path"),
        ("path,split\n1.png,train\n1.png,test\n", "line 3: split 'test'"),
        ("path\n../1.png\n", "line 2: '../1.png' leaves the folder"),
        ("path\n/etc/passwd\n", "leaves the folder"),
        ("path\nC:\\1.png\n", "leaves the folder"),
        ("path\n2.png\n", "2.png: there is no such image"),
        ("path\n", "no image found"),
    ],
)
def test_csv_errors_name_the_line(root: Path, text: str, message: str) -> None:
    touch(root, ["1.png"])
    (root / "list.csv").write_text(text, "utf-8")
    with pytest.raises(DataError) as caught:
        CSV("list.csv").load("train")
    assert str(root / "list.csv") in str(caught.value)
    assert message in str(caught.value)


def test_csv_that_is_not_text(root: Path) -> None:
    (root / "list.csv").write_bytes(b"path\n\xff\xfe.png\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        CSV("list.csv").load("train")
    with pytest.raises(DataError, match="there is no such file"):
        CSV("other.csv").load("train")


def test_synthetic_persons_are_drawn_once(root: Path) -> None:
    options = {"num_train": 2, "num_test": 2, "num_cameras": 2, "images_per_camera": 1,
               "num_distractors": 1, "height": 32, "width": 16}  # fmt: skip
    dataset = SyntheticPersons(**options)
    train = dataset.load("train")
    assert {record.pid for record in train} == {1, 2}
    stamp = Path(train[0].path).stat().st_mtime_ns
    assert SyntheticPersons(**options).load("train") == train
    assert Path(train[0].path).stat().st_mtime_ns == stamp
    assert SyntheticPersons(**{**options, "seed": 1}).folder != dataset.folder
    assert {0, 3, 4} <= {record.pid for record in dataset.load("gallery")}


def test_synthetic_persons_ranges() -> None:
    with pytest.raises(ValueError, match="num_cameras: expected an integer of at least 2, got 1"):
        SyntheticPersons(num_cameras=1)


@pytest.mark.parametrize(
    "listed",
    ["../1.png", "a/../../1.png", "/etc/1.png", "C:\\1.png", "\\\\host\\1.png", "a\\..\\..\\1.png"],
)
def test_a_listed_path_stays_below_its_folder(tmp_path: Path, listed: str) -> None:
    with pytest.raises(DataError, match=r"list\.txt, line 3: .* leaves the folder; paths are rel"):
        join_below(tmp_path, listed, "list.txt, line 3")
    assert join_below(tmp_path, listed, "", allow_outside=True) == tmp_path / listed


def test_an_absolute_path_below_the_folder_is_a_relative_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    for name in ("data/sub", "elsewhere/sub", "data2"):
        (tmp_path / name).mkdir(parents=True)
    (folder / "away").symlink_to(tmp_path / "elsewhere" / "sub")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for base in (folder, Path("data"), tmp_path / "link", Path("data2/../data")):
        assert join_below(base, f"{folder.resolve()}//./sub/1.png", "") == base / "sub" / "1.png"
        for listed in ("data/away/../1.png", "data/sub/../1.png", "data2/1.png", "elsewhere/1.png"):
            with pytest.raises(DataError, match="leaves the folder"):
                join_below(base, f"{tmp_path}/{listed}", "")
    assert join_below(tmp_path / "link", f"{tmp_path}/link/1.png", "") == tmp_path / "link/1.png"


def test_names_with_dots_spaces_and_colons_are_paths(tmp_path: Path) -> None:
    for listed in ("a b/..c.png", "12:30.png", "./Straße/人.png"):
        assert join_below(tmp_path, listed, "") == tmp_path / listed
    for listed in ("", "a\0.png"):
        with pytest.raises(DataError, match="is no path"):
            join_below(tmp_path, listed, "", allow_outside=True)
