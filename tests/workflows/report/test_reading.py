from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from reid.structures import DataError
from reid.workflows.report.reading import FILES, flattened, read_run

MakeRun = Callable[..., Path]


def test_a_run_is_read_whole(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert run.problems == []
    assert run.finished
    assert (run.max_epochs, run.epochs_begun) == (3, 3)
    assert run.settings["CRITERION.0.TEMPERATURE"] == 0.07
    assert run.clusterer == {"NAME": "JaccardDBSCAN", "EPS": 0.5}
    assert [line.numbers["outliers"] for line in run.labels] == [130, 120, 110]
    assert [line.step for line in run.training] == [5, 10, 15, 20, 25, 30]
    assert [(entry.epoch, entry.numbers["mAP"]) for entry in run.evaluations] == [
        (1, 0.5), (2, 0.6), (3, pytest.approx(0.7)),
    ]  # fmt: skip
    (details,) = run.details
    assert details.precision == [0.3, 0.9, 0.05]
    assert [(query.row, query.precision) for query in details.hardest] == [(2, 0.05), (0, 0.3)]
    assert details.cameras is not None
    assert details.cameras.precision == [[None, 0.8], [0.6, None]]
    assert run.log.environment == [("python", "3.11.7 on Linux"), ("device", "cpu")]
    assert run.log.warnings == {"WARNING: first of all": 1}
    assert [image.confidence for image in run.clusters] == [0.9, 0.8, 0.2, 0.1, None]
    assert run.matches[0].similarity == 0.987
    assert len(run.pictures) == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"[", b"null", b"[[1], 2]", b"{}", b"\xff\xfe", b"a: [", b"[" * 100_000,
     b'"a\nb', b"9" * 5000, b'{"history": 3, "final": [{"test_set": "x"}], "provenance": []}'],
)  # fmt: skip
def test_broken_files_are_named(make_run: MakeRun, name: str, content: bytes) -> None:
    folder = make_run()
    (folder / name).write_bytes(content)
    run = read_run(folder)
    known_form = {"results.json": b'{"history', "config.yaml": b'{"'}
    quiet = name == "log.txt" or content in (b"", b"{}")
    quiet = quiet or (name in known_form and content.startswith(known_form[name]))
    assert quiet or any(problem.startswith(name) for problem in run.problems)


def test_wrong_values_are_passed_over(make_run: MakeRun) -> None:
    folder = make_run()
    lines = [
        {"kind": "train", "step": 1, "epoch": 0, "loss": 10**400, "name": "x", "flag": True},
        {"kind": "train", "step": 2**70, "epoch": 0, "loss": 1},
        {"kind": "train", "step": "1", "epoch": 0},
        {"kind": "other", "step": 1, "epoch": 0},
        {"kind": "train", "step": 2, "epoch": 0, "loss": math.inf},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.json").write_text(text + '{"ki')
    run = read_run(folder)
    assert [[*line.numbers] for line in run.training] == [["loss"], ["loss"]]
    assert all(math.isnan(line.numbers["loss"]) for line in run.training)
    assert run.problems == ["metrics.json: 4 lines are cut off or of no known kind"]


def test_results_from_before_a_resume_are_not_the_last_ones(make_run: MakeRun) -> None:
    folder = make_run()
    results = json.loads((folder / "results.json").read_text())
    results["history"] = results["history"][:1]
    (folder / "results.json").write_text(json.dumps(results))
    assert [entry.epoch for entry in read_run(folder).evaluations] == [1, 2, 3]


def test_only_this_runs_part_of_the_log_counts(make_run: MakeRun) -> None:
    folder = make_run()
    start = "11-27 10:00:00  Environment\nhost  a\n11-27 10:00:00  Config\nSEED: 1\n"
    (folder / "log.txt").write_text(
        f"{start}11-27 10:00:01  WARNING: of an older run\n"
        f"{start}11-27 10:00:01  WARNING: of this run\n11-27 10:00:02  ERROR: stopped by X: no\n"
        f"{start}11-27 10:00:01  Resumed from checkpoint\n11-27 10:00:01  WARNING: of this run\n"
        "11-27 10:00:02  ERROR: stopped by Interrupted: SIGTERM\nmore of it\n"
        "11-27 10:00:09  Environment\nhost  b\n11-27 10:00:10  WARNING: of an evaluation\n"
    )
    log = read_run(folder).log
    assert log.warnings == {
        "ERROR: stopped by X: no": 1,
        "WARNING: of this run": 2,
        "ERROR: stopped by Interrupted: SIGTERM\nmore of it": 1,
    }
    assert log.stopped == "Interrupted: SIGTERM\nmore of it"
    assert log.environment == [("host", "a")]


def test_a_run_that_did_not_end(make_run: MakeRun) -> None:
    run = read_run(make_run(finished=False))
    assert not run.finished
    assert [entry.epoch for entry in run.evaluations] == [1, 2, 3]  # from metrics.json
    assert run.details == []


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "model_final.safetensors").touch()
    with pytest.raises(DataError, match=r"has none of config\.yaml"):
        read_run(tmp_path)


def test_settings_have_the_keys_of_a_command_line() -> None:
    tree = {"a": {"b": 1, "c": {}}, "d": [{"name": "X"}, "Y", {"e": [1, 2]}], "f": [], "g": None}
    assert dict(flattened(tree)) == {
        "A.B": 1, "A.C": {}, "D.0.NAME": "X", "D.1.NAME": "Y", "D.2.E": [1, 2], "F": [], "G": None,
    }  # fmt: skip
