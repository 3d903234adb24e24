from __future__ import annotations

import logging
import os

import pytest
import torch

from reid.engine.logs import environment, progress_bar, run_logging, tool_logging
from reid.files import OutputError, write_text
from reid.structures import DataError
from reid.workflows.errors import tell


def test_log_goes_to_console_and_file(tmp_path, capsys):
    with run_logging(tmp_path):
        logging.getLogger("reid.part").info("hello")
        logging.getLogger("reid.part").warning("careful")
    logging.getLogger("reid.part").info("after")
    written = (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().out == written
    assert [line.split("  ", 1)[1] for line in written.splitlines()] == [
        "hello",
        "WARNING: careful",
    ]
    assert "\x1b" not in written


def test_a_name_that_is_not_utf8_stops_nothing(tmp_path, capsys):
    with run_logging(tmp_path):
        logging.getLogger("reid.part").info("lat-\udce9.jpg")
    written = (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().out == written
    assert written.endswith("  lat-\\udce9.jpg\n")


def test_a_tool_shows_messages_as_they_are(capsys):
    logger = logging.getLogger("reid.part")
    with tool_logging():
        logger.info("cameras: %s", 3)
        logger.warning("passed over %s", 4)
    logger.info("after")
    assert capsys.readouterr().out == "cameras: 3\nWARNING: passed over 4\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "second \ud800")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_no_bar_in_a_pipe(capfd):
    with progress_bar("Extracting") as progress:
        progress(3, 10)
        progress(10, 10)
    assert capfd.readouterr() == ("", "")


def test_environment_names_versions_and_device():
    text = environment(torch.device("cpu"))
    for word in ("python", "torch", "timm", "reid", "cpu"):
        assert word in text


def test_control_characters_are_escaped(tmp_path, capsys):
    with run_logging(tmp_path):
        logging.getLogger("reid.part").warning("%s: is broken", "\x1b[2J\u202egpj.exe")
    out = capsys.readouterr().out
    assert out == (tmp_path / "log.txt").read_text()
    assert out.endswith("  WARNING: \\x1b[2J\\u202egpj.exe: is broken\n")
    assert tell(DataError("\x1b[2J.jpg: is broken")) == 2
    assert capsys.readouterr().err == "DataError: \\x1b[2J.jpg: is broken\n"


@pytest.mark.skipif(os.name == "nt", reason="makes pipes")
def test_only_a_regular_file_is_a_log(tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with (
        pytest.raises(OutputError, match=r"log\.txt: is a pipe, expected a regular file"),
        run_logging(tmp_path),
    ):
        pass


def test_the_log_goes_on_through_a_link(tmp_path):
    (tmp_path / "log.txt").symlink_to(tmp_path / "far.txt")
    for _ in range(2):
        with run_logging(tmp_path):
            logging.getLogger("reid.part").info("hello")
    assert (tmp_path / "log.txt").is_symlink()
    assert (tmp_path / "far.txt").read_text().count("hello") == 2
