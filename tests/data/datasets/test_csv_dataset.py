from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from reid.data.datasets import CSV
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
