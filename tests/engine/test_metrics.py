from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reid.engine.metrics import MetricWriter
from reid.files import InputError, OutputError


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


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
    writer.write_image("pictures/p", tmp_path / "p.png", 7)  # writes nothing before `start`
    writer.start()
    writer.write_image("pictures/p", tmp_path / "p.png", 7)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("pictures/p")
    assert (image.step, image.width, image.height) == (7, 5, 3)


def test_a_resumed_run_drops_lines_written_after_the_checkpoint(tmp_path):
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
    assert "metrics.json: dropped lines that are not metrics: line 1 (" in caplog.text
    assert "and 1 more" in caplog.text


def test_tensorboard_has_no_thread(tmp_path):
    before = threading.active_count()
    writer = MetricWriter(tmp_path)
    writer.start()
    writer.write("train", 1, 0, {"loss": 2.0})
    assert threading.active_count() == before
    events = EventAccumulator(str(tmp_path))
    events.Reload()  # finds the line though the writer is still open
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


@pytest.mark.skipif(os.name == "nt", reason="makes pipes")
def test_only_a_regular_file_holds_metrics(tmp_path):
    os.mkfifo(tmp_path / "metrics.json")
    writer = MetricWriter(tmp_path)
    with pytest.raises(InputError, match=r"metrics\.json: is a pipe, expected a regular file"):
        writer.start(epoch=1, step=3)
