from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from reid.data.datasets import CSV
from reid.data.datasets.csv_dataset import read_csv
from reid.structures import DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    for name in ("1.png", "a b, ü.png"):
        (tmp_path / name).touch()
    return tmp_path


def test_further_columns_are_kept(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (root / "list.csv").write_text('path,pid,Frame no,note\n1.png,3,007,"left, ""x"""\n', "utf-8")
    (record,) = CSV("list.csv").load("train")
    assert record.extra == {"Frame no": "007", "note": 'left, "x"'}
    assert "further columns kept: Frame no, note" in caplog.text
    copy = pickle.loads(pickle.dumps(record))
    assert copy == record
    assert copy.extra == record.extra
    assert hash(copy) == hash(record)


@pytest.mark.parametrize(
    "text",
    [
        '\ufeffpath,pid\r\n"a b, ü.png",5\r\n\r\n1.png,6\r\n',
        "path;pid\na b, ü.png;5\n1.png;6\n",
        "path\tpid\na b, ü.png\t5\n1.png\t6",
        '"path", "pid"\n"a b, ü.png", 5\n1.png, 6\n',
    ],
)
def test_forms_of_csv(root: Path, text: str) -> None:
    (root / "list.csv").write_bytes(text.encode())
    records = CSV("list.csv").load("train")
    assert [(Path(r.path).name, r.pid) for r in records] == [("a b, ü.png", 5), ("1.png", 6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,PID\n1.png,1\n", "column 'PID': did you mean 'pid'"),
        ("path,cam_id\n1.png,1\n", "column 'cam_id': did you mean 'camid'"),
        ("path,identity\n1.png,1\n", "column 'identity': did you mean 'pid'"),
        ("path,pid,pid\n1.png,1,2\n", "a name for each column, and each once"),
        (",path\n0,1.png\n", "a name for each column"),
        ('path,pid\n1.png,1\n"1.png,2\n', "line 3: is not CSV (unexpected end of data)"),
        (f"path,pid\n1.png,{'9' * 19}\n", "line 2: pid is '9999999999999999999'; expected"),
        (f"path\n{'x' * 300}.png\n", "there is no such image, but"),
        ("path\n../1.png\n", "ALLOW_OUTSIDE: true takes it"),
    ],
)
def test_errors_name_the_file(root: Path, text: str, message: str) -> None:
    (root / "list.csv").write_text(text, "utf-8")
    with pytest.raises(DataError) as caught:
        CSV("list.csv").load("train")
    assert str(root / "list.csv") in str(caught.value)
    assert message in str(caught.value)


def test_paths_outside_on_request(root: Path) -> None:
    (root / "lists").mkdir()
    (root / "lists" / "list.csv").write_text(f"path\n../1.png\n{root}/1.png\n", "utf-8")
    records = CSV("lists/list.csv", allow_outside=True).load("train")
    assert [Path(record.path).resolve() for record in records] == [root.resolve() / "1.png"] * 2


def test_an_absolute_path_below_the_folder(root: Path) -> None:
    (root / "list.csv").write_text(f"path\n{root}/1.png\n", "utf-8")
    (record,) = CSV("list.csv").load("train")
    assert record.path == str(root / "1.png")


def listed(root: Path, text: str) -> CSV:
    (root / "list.csv").write_bytes(text.encode())
    for name in ("q1", "q2", "g1", "g2"):
        (root / f"{name}.jpg").touch()
    return CSV("list.csv")


def labels(dataset: CSV) -> list[tuple[int, int]]:
    return [(r.pid, r.camid) for split in ("query", "gallery") for r in dataset.load(split)]


def test_whole_floats_are_numbers(root: Path) -> None:
    dataset = listed(
        root,
        "path,pid,camid,split\nq1.jpg,1.0,0.0,query\ng1.jpg,1,1.00,gallery\n"
        "q2.jpg,104.,0,query\ng2.jpg,-1.0,-1,gallery\n",
    )
    assert labels(dataset) == [(1, 0), (104, 0), (1, 1), (-1, -1)]
    assert (dataset.identities, dataset.cameras) == ({}, ())


def test_names_are_numbered_in_natural_order(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dataset = listed(
        root,
        "path,pid,camid,split\nq1.jpg,p10,cam10,query\ng1.jpg, p2 ,cam2,gallery\n"
        "q2.jpg,7.0,,query\ng2.jpg,-1,cam2,gallery\n",
    )
    assert labels(dataset) == [(2, 1), (0, -1), (1, 0), (-1, 0)]
    assert dataset.identities == {0: "7", 1: "p2", 2: "p10"}
    assert dataset.cameras == ("cam2", "cam10")
    assert dataset.load("query")[0].extra == {"camera": "cam10"}
    assert dataset.load("query")[1].extra == {}
    assert "cameras 0 = 'cam2', 1 = 'cam10'" in caplog.text
    assert "identities 0 = '7', 1 = 'p2', 2 = 'p10'" in caplog.text


@pytest.mark.parametrize("word", ["1.5", "-2", "1e3", "1,5", "NaN", "<NA>", "None", "٣", "+1"])
def test_malformed_numbers_are_an_error(root: Path, word: str) -> None:
    dataset = listed(root, f"path;pid\nq1.jpg;1\nq2.jpg;{word}\n")
    with pytest.raises(DataError, match=r"list\.csv, line 3: pid is '"):
        dataset.load("train")
    with pytest.raises(DataError, match="line 2: camid has 256 characters"):
        listed(root, f"path,camid\nq1.jpg,{'x' * 256}\n").load("train")


def test_backslashes_in_a_missing_path_get_a_hint(root: Path) -> None:
    dataset = listed(root, "path\ncam0\\q1.jpg\n")
    with pytest.raises(DataError, match=r"lists it; Windows puts backslashes .*, write / in their"):
        dataset.load("train")
    (root / "cam0").mkdir()
    (root / "cam0" / "q1.jpg").touch()
    with pytest.raises(DataError, match=r"cam0/q1\.jpg is there\)"):
        dataset.load("train")
    (root / "cam0\\q1.jpg").touch()  # a file's name may hold a backslash
    assert len(dataset.load("train")) == 1
    with pytest.raises(DataError, match=r"leaves the folder.*Windows puts backslashes"):
        listed(root, "path\nC:\\own\\1.png\n").load("train")


@pytest.mark.parametrize(("text", "message"), [
    ("sep=;\npath;pid\nq1.jpg;1\n", "remove this line, which is for Excel"),
    (",path,pid\n0,q1.jpg,1\n", "pandas' index: write with index=False"),
    ("path\nq1\0.jpg\n", r"list\.csv: has a NUL byte in line 2, which no text has; expected a CSV"),
])  # fmt: skip
def test_headers_of_other_programs_get_a_hint(root: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        listed(root, text).load("train")
    assert "ALLOW_OUTSIDE" not in str(caught.value)


def test_utf16_is_an_error(root: Path) -> None:
    (root / "list.csv").write_bytes("path\nq1.jpg\n".encode("utf-16"))
    with pytest.raises(DataError, match="is not UTF-8 text but UTF-16; save it as UTF-8"):
        CSV("list.csv").load("train")


def test_an_image_has_one_identity(root: Path) -> None:
    header = "path,pid,camid,split\n"
    for rows in (
        "q1.jpg,1,0,query\n./q1.jpg,2,0,gallery\n",
        "q1.jpg,,0,train\nq1.jpg,1,0,query\nq1.jpg,2,0,gallery\n",
    ):
        with pytest.raises(DataError, match=r"q1\.jpg with identity 1 and again with 2; an image"):
            listed(root, header + rows).load("query")
    dataset = listed(root, f"{header}q1.jpg,,,train\nq1.jpg,1,0,query\nq1.jpg,1,0,gallery\n")
    assert labels(dataset) == [(1, 0), (1, 0)]


def test_a_list_of_features_may_name_a_picture_for_several_persons(root: Path) -> None:
    listed(root, "path,pid,split\nq1.jpg,1,query\nq1.jpg,2,query\n")
    assert [record.pid for _, record in read_csv(root / "list.csv")] == [1, 2]


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_only_regular_files_are_read(root: Path) -> None:
    os.mkfifo(root / "pipe.jpg")
    with pytest.raises(DataError, match=r"pipe\.jpg: is no file, but .*list\.csv lists it"):
        listed(root, "path\npipe.jpg\n").load("train")
    (root / "list.csv").unlink()
    os.mkfifo(root / "list.csv")
    with pytest.raises(DataError, match=r"list\.csv: is a pipe, expected a regular file"):
        CSV("list.csv").load("train")
    (root / "zero.csv").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"zero\.csv: is a device, expected a regular file"):
        CSV("zero.csv").load("train")
    with (root / "large.csv").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"large\.csv: 1,099,.* bytes are too many for a text"):
        CSV("large.csv").load("train")


def test_a_column_of_viewpoints(root: Path) -> None:
    rows = ["path,pid,camid,view", "1.png,0,0,3", '"a b, ü.png",0,1,', '"a b, ü.png",0,1,-1']
    (root / "list.csv").write_text("\n".join(rows) + "\n", "utf-8")
    records = CSV("list.csv").load("train")
    assert [record.extra["view"] for record in records] == [3, -1, -1]
    (root / "list.csv").write_text("\n".join([*rows, "1.png,0,0,front"]) + "\n", "utf-8")
    with pytest.raises(DataError, match="line 5: view is 'front'; expected a whole number from 0"):
        CSV("list.csv").load("train")
