from __future__ import annotations

import os
from pathlib import Path

import pytest

from reid.data.datasets import CSV
from reid.data.datasets.joining import LeaveOut, join_images, unique_names
from reid.structures import DataError, ImageRecord


def test_identities_and_cameras_of_datasets_stay_apart() -> None:
    first = [ImageRecord("a", 7, 0), ImageRecord("b", -1, -1, extra={"x": "1"}),
             ImageRecord("c", 0, 5), ImageRecord("d", 7, 5)]  # fmt: skip
    second = [ImageRecord("e", 7, 5), ImageRecord("f", -1, 0)]
    joined = join_images([("A", first), ("B", second)])
    assert [(r.path, r.pid, r.camid, r.source) for r in joined.records] == [
        ("a", 1, 0, "A"), ("b", -1, -1, "A"), ("c", 0, 1, "A"), ("d", 1, 1, "A"),
        ("e", 2, 3, "B"), ("f", -1, 2, "B")]  # fmt: skip
    assert joined.identities == (("A", 0), ("A", 7), ("B", 7))
    assert joined.cameras == (("A", 0), ("A", 5), ("B", 0), ("B", 5))
    assert joined.records[1].extra == {"x": "1"}


def test_names_are_unique() -> None:
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert unique_names(["a", "a (2)", "a"]) == ["a", "a (2)", "a (3)"]


@pytest.fixture
def dataset(tmp_path: Path) -> CSV:
    for name in ("1.png", "2 #.png", "#3.png", "sub/4.png"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).touch()
    (tmp_path / "own" / "list.csv").write_text(
        "path,split\n1.png,train\n2 #.png,train\n#3.png,train\nsub/4.png,query\n"
    )
    return CSV("own/list.csv", root=str(tmp_path))


def test_listed_images_are_left_out(
    dataset: CSV, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "fix.txt"
    file.write_bytes(b"\xef\xbb\xbf# broken images\r\n\r\nown/sub/../2 #.png\r\n./own/#3.png\r\n"
                     b"  # more\nown/gone.png\n")  # fmt: skip
    dataset.same_numbers = False
    fixed = LeaveOut(dataset, file)
    assert not fixed.same_numbers
    assert [Path(record.path).name for record in fixed.load("train")] == ["1.png"]
    assert [Path(record.path).name for record in fixed.load("query")] == ["4.png"]
    assert fixed.name == "own"
    assert not fixed.has_test()
    assert "1 of 3 paths are no files, the first is" in caplog.text
    assert "own train: 2 of 3 images left out" in caplog.text
    assert "own query: 0 of 1 images left out" in caplog.text


def test_absolute_paths_and_nothing_left(dataset: CSV, tmp_path: Path) -> None:
    file = tmp_path / "fix.txt"
    file.write_text(f"{tmp_path}/own/sub/4.png\n")
    with pytest.raises(DataError, match=r"fix\.txt: leaves out every image of own query"):
        LeaveOut(dataset, file).load("query")
    with pytest.raises(ValueError, match=r"leave_out: .*gone\.txt: there is no such file; exp"):
        LeaveOut(dataset, tmp_path / "gone.txt")


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_only_regular_files_of_bounded_size_are_lists(
    dataset: CSV, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**32)
    (tmp_path / "nul").write_bytes(b"own/1.png\nown/\0.png\n")
    for name, message in (
        ("pipe", "pipe: is a pipe, expected a regular file; expected a text file with a path a"),
        ("zero", "zero: is a device"),
        ("sparse", "sparse: 4,294,967,296 bytes are too many for a text"),
        ("nul", "nul: has a NUL byte in line 2"),
    ):
        with pytest.raises(ValueError, match=f"leave_out: .*{message}"):
            LeaveOut(dataset, tmp_path / name)
    (tmp_path / "windows").write_text("own\\1.png\r\n")
    LeaveOut(dataset, tmp_path / "windows")
    assert "Windows puts backslashes between folders, write / in their place (" in caplog.text
