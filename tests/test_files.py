from __future__ import annotations

import errno
import io
import sys
from pathlib import Path

import pytest

from reid.files import OutputError, escape_output, remove_leftovers, replacing, write_text


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    write_text(path, "twö")
    assert path.read_text("utf-8") == "twö"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_bytes_of_names_stay_what_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ü \udce9.jpg")
    assert (tmp_path / "a.txt").read_bytes() == "ü ".encode() + b"\xe9.jpg"


def test_the_console_takes_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    escape_output()
    sys.stdout.write("ü \udce9.jpg")
    assert written.getvalue() == rb"\xfc \udce9.jpg"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    escape_output()  # it takes all as it is


def test_after_an_error_the_old_file_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_what_the_system_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OutputError, match=r"file/a.txt: cannot be written \((Not a directory|File exists)\)"
    ):
        write_text(tmp_path / "file" / "a.txt", "x")

    def fail() -> None:
        with replacing(tmp_path / "b.txt") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"b.txt: cannot be written \(No space left"):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_only_what_a_kill_has_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.txt.abcd_12x.part", ".part", ".a.part", "b.part", "a.txt"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {".part", ".a.part", "b.part", "a.txt"}
