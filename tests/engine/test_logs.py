from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reid.engine.logs import (
    MetricWriter,
    environment,
    progress_bar,
    run_logging,
    tool_logging,
    write_text,
)
from reid.files import InputError, OutputError
from reid.structures import DataError
from reid.workflows.errors import tell


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


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


def test_metrics_are_one_object_a_line_and_tensorboard_events(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.start()
    writer.write("train", 10, 0, {"loss": 2.0})
    writer.write("test", 10, 1, {"mAP": 0.5})
    writer.close()
    assert lines(tmp_path) == [
        {"kind": "train", "step": 10, "epoch": 0, "loss": 2.0},
        {"kind": "test", "step": 10, "epoch": 1, "mAP": 0.5},
    ]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_pictures_are_shown_in_tensorboard(tmp_path):
    Image.new("RGB", (5, 3), (10, 20, 30)).save(tmp_path / "p.png")
    writer = MetricWriter(tmp_path)
    writer.write_image("pictures/p", tmp_path / "p.png", 7)  # before the start: nothing
    writer.start()
    writer.write_image("pictures/p", tmp_path / "p.png", 7)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("pictures/p")
    assert (image.step, image.width, image.height) == (7, 5, 3)


def test_a_resumed_run_drops_what_the_broken_one_wrote_after_its_checkpoint(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.start()
    kept = [("test", 0, 0), ("labels", 0, 0), ("train", 10, 0)]
    dropped = [("test", 10, 1), ("labels", 10, 1), ("train", 15, 1)]
    for kind, step, epoch in kept + dropped:
        writer.write(kind, step, epoch, {"x": 1.0})
    writer.close()
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"kind": "tra')
    writer = MetricWriter(tmp_path)
    writer.start(epoch=1, step=10)
    writer.close()
    assert [(line["kind"], line["step"], line["epoch"]) for line in lines(tmp_path)] == kept
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = {kind: [event.step for event in events.Scalars(f"{kind}/x")] for kind, *_ in kept}
    assert shown == {"test": [0], "labels": [0], "train": [10]}
    writer = MetricWriter(tmp_path)
    writer.start()
    writer.close()
    assert not (tmp_path / "metrics.json").exists()


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


def test_what_a_terminal_would_obey_is_escaped(tmp_path, capsys):
    with run_logging(tmp_path):
        logging.getLogger("reid.part").warning("%s: is broken", "\x1b[2J\u202egpj.exe")
    out = capsys.readouterr().out
    assert out == (tmp_path / "log.txt").read_text()
    assert out.endswith("  WARNING: \\x1b[2J\\u202egpj.exe: is broken\n")
    assert tell(DataError("\x1b[2J.jpg: is broken")) == 2
    assert capsys.readouterr().err == "DataError: \\x1b[2J.jpg: is broken\n"


@pytest.mark.skipif(os.name == "nt", reason="makes pipes")
def test_only_regular_files_are_logs(tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with (
        pytest.raises(OutputError, match=r"log\.txt: is a pipe, expected a regular file"),
        run_logging(tmp_path),
    ):
        pass
    os.mkfifo(tmp_path / "metrics.json")
    writer = MetricWriter(tmp_path)
    with pytest.raises(InputError, match=r"metrics\.json: is a pipe, expected a regular file"):
        writer.start(epoch=1, step=3)


def test_the_log_goes_on_through_a_link(tmp_path):
    (tmp_path / "log.txt").symlink_to(tmp_path / "far.txt")
    for _ in range(2):
        with run_logging(tmp_path):
            logging.getLogger("reid.part").info("hello")
    assert (tmp_path / "log.txt").is_symlink()
    assert (tmp_path / "far.txt").read_text().count("hello") == 2


@pytest.mark.parametrize("foreign", [
    '{"kind": "tra', "3", "[]", "null", "{}", "hello", "\0\0\0", "[" * 100_000, "\udcff",
    '{"kind": "train", "step": "1", "epoch": 0}', '{"kind": "train", "step": 1, "epoch": -1}',
    '{"kind": "train", "step": true, "epoch": 0}', '{"kind": 1, "step": 1, "epoch": 0}',
    '{"kind": "train", "step": 1, "epoch": 0, "loss": "low"}',
    '{"kind": "train", "step": 1, "epoch": 0, "loss": null}',
    '{"kind": "train", "step": 1' + "0" * 30 + ', "epoch": 0}',
    '{"kind": "train", "step": 1, "epoch": 0, "loss": 1' + "0" * 400 + "}",
])  # fmt: skip
def test_foreign_lines_are_dropped_with_a_warning(tmp_path, caplog, foreign):
    path = tmp_path / "metrics.json"
    good = '{"kind": "train", "step": 3, "epoch": 0, "loss": NaN, "self": 1}\n'
    path.write_text(f"{foreign}\n{good}{foreign}\n", errors="surrogateescape")
    writer = MetricWriter(tmp_path)
    writer.start(epoch=1, step=3)
    writer.close()
    assert path.read_text() == good
    assert "metrics.json: dropped what is no line of metrics: line 1 (" in caplog.text
    assert "and 1 more" in caplog.text


def test_tensorboard_has_no_thread(tmp_path):
    before = threading.active_count()
    writer = MetricWriter(tmp_path)
    writer.start()
    writer.write("train", 1, 0, {"loss": 2.0})
    assert threading.active_count() == before
    events = EventAccumulator(str(tmp_path))
    events.Reload()  # each line is there at once
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0)]
    writer.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_names_the_file_of_tensorboard(tmp_path, monkeypatch, capfd):
    real = Path.open

    def full(path, *arguments, **options):
        place = Path("/dev/full") if "tfevents" in path.name else path
        return real(place, *("wb" if mode == "xb" else mode for mode in arguments), **options)

    writer = MetricWriter(tmp_path)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OutputError, match=r"/events\.out\.tfevents\.[^/]+: cannot .*\(No space"):
        writer.start()
    assert capfd.readouterr() == ("", "")
