from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from reid.evaluation.feature_files import load_features
from reid.file_kinds import read_head
from reid.files import (
    InputError,
    OutputError,
    escape_output,
    open_regular,
    open_to_append,
    printable,
    read_bytes,
    read_json,
    read_text,
    remove_leftovers,
    replacing,
    say,
    write_text,
)
from reid.modeling.weights import WeightsError, read_checkpoint
from reid.structures import DataError

on_posix = pytest.mark.skipif(os.name == "nt", reason="makes pipes, devices and links")


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
    escape_output()  # a stream that is not a TextIOWrapper stays unchanged


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


@on_posix
@pytest.mark.parametrize("read", [open_regular, lambda path: read_bytes(path, 9), read_text])
def test_only_regular_files_are_read_and_none_is_waited_for(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (
        (tmp_path / "pipe", "pipe: is a pipe, expected a regular file"),
        (tmp_path / "link", "link: is a pipe, expected a regular file"),
        (tmp_path, "is a folder, expected a regular file"),
        (Path("/dev/zero"), "/dev/zero: is a device, expected a regular file"),
        (tmp_path / "gone", "gone: there is no such file"),
        (tmp_path / "gone" / "file", "gone/file: there is no such file"),
        (tmp_path / "loop", r"loop: cannot be read \(Too many levels"),
        (tmp_path / "a\0b", r"cannot be read \(embedded null"),
        (tmp_path / ("x" * 300), r"cannot be read \(File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            read(path)


@on_posix
def test_a_file_that_becomes_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    as_before = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *_: as_before)
    with pytest.raises(InputError, match="file: is a pipe, expected a regular file"):
        open_regular(path)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        InputError, match=r"sparse: 1,099,511,627,776 bytes are too many for a text"
    ):
        read_text(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(InputError, match="5 bytes are too many for a file, at most 4"):
        read_bytes(path, 4)


@pytest.mark.parametrize(("content", "message"), [
    (b"a\nb\0c\n", r"list\.txt: has a NUL byte in line 2, which no text has"),
    ("a\n".encode("utf-16"), r"list\.txt: is not UTF-8 text but UTF-16; save it"),
    (b"a\n\nb\xe9\n", r"list\.txt: is not UTF-8 text \(byte 0xe9 in line 3\); save it"),
    (bytes(99), r"list\.txt: has a NUL byte in line 1"),
])  # fmt: skip
def test_what_is_no_text_is_told_by_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / "list.txt")


def test_text_comes_as_it_is_without_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffü\r\n".encode() + b"\xe9")
    assert read_text(path, errors="surrogateescape") == "ü\r\n\udce9"
    path.write_bytes(b"")
    assert read_text(path) == ""


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x1b[2J"])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json: is not JSON"):
        read_json(tmp_path / "x.json")


@on_posix
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for name in ("old", "new"):  # an existing file, and a new one
        link = tmp_path / name
        link.symlink_to(tmp_path / "far" / name)
    (tmp_path / "far" / "old").write_text("before")
    for name in ("old", "new"):
        write_text(tmp_path / name, "after")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "far" / name).read_text() == "after"
    assert sorted(entry.name for entry in (tmp_path / "far").iterdir()) == ["new", "old"]


@on_posix
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "null"):
        write_text(path, "x")
        assert path.is_char_device()
    assert (tmp_path / "null").is_symlink()
    with pytest.raises(OutputError, match=r"/dev/full: cannot be written \(No space left"):
        write_text(Path("/dev/full"), "x")


@on_posix
def test_a_pipe_gets_the_bytes_if_somebody_reads(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="pipe: is a pipe that nobody reads"):
        write_text(pipe, "x")
    got: list[str] = []
    opened = threading.Event()

    def read() -> None:
        descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        opened.set()
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor) as file:
            while not got:  # empty until somebody writes
                text = file.read()
                if text:
                    got.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    opened.wait()
    write_text(pipe, "ü" * 100_000)
    reader.join()
    assert "".join(got) == "ü" * 100_000
    assert pipe.is_fifo()


@on_posix
def test_an_open_file_of_the_shell_goes_on_where_it_is(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from reid.files import say, write_text; say('one'); "
        "write_text(Path('/dev/stdout'), 'two\\n'); say('three')"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"


def test_a_folder_or_a_socket_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder, expected the name of a file"):
        write_text(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


@on_posix
def test_only_regular_files_are_appended_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        with open_to_append(tmp_path / name) as file:
            file.write(name)
    assert (tmp_path / "file").read_text() == "filelink"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="pipe: is a pipe, expected a regular file"):
        open_to_append(tmp_path / "pipe")
    with pytest.raises(OutputError, match="/dev/null: is a device, expected a regular file"):
        open_to_append(Path("/dev/null"))


def test_a_terminal_shows_what_it_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\tb\nü 人 \x1b[2J\r\x07\x9b1m\u202egpj.exe")
    shown = "a\tb\nü 人 \\x1b[2J\\r\\x07\\x9b1m\\u202egpj.exe\n"
    assert capsys.readouterr().out == shown
    assert printable("\udce9") == "\udce9"  # no character; the console escapes it


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
def test_a_file_that_opens_but_gives_no_bytes_is_named() -> None:
    """As on a broken disk."""
    with pytest.raises(InputError, match=r"^/proc/self/mem: cannot be read \(Input/output error"):
        read_head("/proc/self/mem")
    with pytest.raises(WeightsError, match=r"^/proc/self/mem: cannot be read"):
        read_checkpoint(Path("/proc/self/mem"))
    with pytest.raises(DataError, match=r"^/proc/self/mem: cannot be read"):
        load_features(Path("/proc/self/mem"))
