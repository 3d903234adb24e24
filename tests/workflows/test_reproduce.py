"""Tables of runs on drawn persons."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reid.__main__ import main as reid_command
from reid.engine import stopping
from reid.engine.hooks.checkpoints import checkpoint_paths
from reid.engine.stopping import TimeIsUp
from reid.engine.trainer import Trainer
from reid.registry import HOOK, ConfigError, Hook
from reid.workflows import reproduce as module
from reid.workflows.comparison import load_paper
from reid.workflows.reproduce import plan_runs, reproduce

TOOL = Path(__file__).parents[2] / "tools" / "reproduce.py"
TABLES = """
paper: A paper
data_config: "{dataset}.yaml"
metrics: [mAP, Rank-1]
datasets:
  drawn: {label: Drawn, counts: {train identities: 8, query cameras: 4}}
  other: {label: Other}
methods:
  plain: {label: Plain, configs: ["{dataset}.yaml"], published: {drawn: [10, 20]}}
  sharp: {label: Sharp, configs: ["{dataset}.yaml", sharp.yaml], published: {drawn: [5, 20]}}
  known: {label: Known, note: no code, published: {drawn: [90, 95]}}
tables:
  1: {title: Counts, datasets: [drawn]}
  2: {title: Rows, datasets: [drawn], metrics: [mAP, Rank-1],
      rows: {plain: "", sharp: "", known: ""}}
"""
DRAWN = """
DATASETS: {TRAIN: {NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 5, NUM_CAMERAS: 3,
                   NUM_DISTRACTORS: 4, HEIGHT: 32, WIDTH: 16}}
INPUT: {SIZE: [64, 32]}
DATALOADER: {NUM_WORKERS: 0, SAMPLER: {NAME: PKSampler, BATCH_SIZE: 8, STEPS_PER_EPOCH: 1}}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CRITERION: [CrossEntropy]
SOLVER: {MAX_EPOCHS: 2, WARMUP_EPOCHS: 0, MILESTONES: []}
HOOKS: [TrapInReproduce, ClockInReproduce]
DEVICE: cpu
"""


@HOOK.register()
class TrapInReproduce(Hook):
    """Raises `error` when the run in a folder of the name `folder` starts its second epoch."""

    folder = ""
    error: BaseException = KeyboardInterrupt()

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir

    def before_epoch(self, trainer: Trainer) -> None:
        if trainer.epoch == 1 and self.folder in self._folder.parts:
            raise self.error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("tables")
    (root / "tables.yaml").write_text(TABLES)
    (root / "drawn.yaml").write_text(DRAWN)
    (root / "sharp.yaml").write_text("CRITERION: [{NAME: CrossEntropy, SMOOTHING: 0.2}]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATASETS", str(root / "datasets"))
        yield root


def table(folder: Path, output: str, number: int = 2, **options: object) -> tuple[bool, str]:
    said: list[str] = []
    whole = reproduce(
        load_paper(folder / "tables.yaml"), number, str(options.pop("dataset", "drawn")),
        folder / output, say=said.append, **options,
    )  # fmt: skip
    return whole, "\n".join(said)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    whole, said = table(folder, "finished")
    assert whole, said
    return folder / "finished" / "drawn"


def test_rows_are_trained_and_compared(finished: Path) -> None:
    content = json.loads((finished / "table_2.json").read_text())
    plain, sharp, known = content["rows"]
    for row, options in ((plain, []), (sharp, ["SMOOTHING: 0.2"])):
        run = finished / row["row"] / "seed1"
        results = json.loads((run / "results.json").read_text())
        numbers = results["final"][0]["numbers"]
        assert row["metrics"]["mAP"]["values"] == [100 * numbers["mAP"]]
        assert row["finished_seeds"] == [1]
        assert all(option in (run / "config.yaml").read_text() for option in options)
    assert (known["seeds"], known["note"]) == ([], "published numbers only: no code")
    assert content["order"]["mAP"]["rows"] == 2
    assert "Plain" in (finished / "table_2.txt").read_text()
    assert "| Plain" in (finished / "table_2.md").read_text()


def test_finished_rows_are_skipped_and_seeds_added(finished: Path) -> None:
    before = (finished / "plain" / "seed1" / "metrics.json").read_text()
    whole, said = table(finished.parents[1], "finished", seeds=2, rows=["plain"])
    assert whole
    assert said.count("finished already") == 1
    assert (finished / "plain" / "seed1" / "metrics.json").read_text() == before
    (row,) = json.loads((finished / "table_2.json").read_text())["rows"]
    assert row["finished_seeds"] == [1, 2]
    one, two = row["metrics"]["mAP"]["values"]
    assert row["metrics"]["mAP"]["std"] == pytest.approx(abs(one - two) / 2**0.5)


def test_a_changed_config_is_named_before_anything_is_trained(finished: Path) -> None:
    root = finished.parents[1]
    with pytest.raises(ConfigError, match="another config") as caught:
        table(root, "finished", overrides=["SOLVER.BASE_LR", "0.5", "LOG_PERIOD", "7"])
    message = str(caught.value)
    for row in ("plain", "sharp"):
        assert f"{finished / row / 'seed1'}: solver.base_lr 0.00035 there, 0.5 now" in message
    assert "log_period" not in message


def test_a_failed_row_does_not_stop_the_others_and_goes_on_later(
    folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrapInReproduce, "folder", "plain")
    monkeypatch.setattr(TrapInReproduce, "error", RuntimeError("out of memory"))
    whole, said = table(folder, "failing")
    assert not whole
    assert "seed1 failed: RuntimeError: out of memory" in said
    rows = json.loads((folder / "failing" / "drawn" / "table_2.json").read_text())["rows"]
    assert [row["finished_seeds"] for row in rows] == [[], [1], []]
    assert rows[0]["note"] == "seed 1 failed"

    monkeypatch.setattr(TrapInReproduce, "folder", "")
    whole, said = table(folder, "failing")
    assert whole
    assert "plain/seed1: goes on" in said
    assert said.count("finished already") == 1
    # A resumed run gives the results of an uninterrupted one.
    runs = [
        root / "plain" / "seed1" / "results.json" for root in (finished, folder / "failing/drawn")
    ]
    one, other = (json.loads(path.read_text())["final"] for path in runs)
    assert one == other


def test_an_interrupt_passes_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrapInReproduce, "folder", "plain")
    with pytest.raises(KeyboardInterrupt):
        table(folder, "interrupted")
    assert checkpoint_paths(folder / "interrupted/drawn/plain/seed1")
    assert not (folder / "interrupted/drawn/sharp").exists()


class Clock:
    """Stands in for the module `time` where a deadline is checked; `now` is its only time."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


@HOOK.register()
class ClockInReproduce(Hook):
    """Sets the clock to 9 when a run in a folder of the name `folder` starts its first epoch."""

    folder = ""

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir

    def before_epoch(self, trainer: Trainer) -> None:
        if self.folder in self._folder.parts:
            Clock.now = 9.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(Clock, "now", 0.0)
    for user in (module, stopping):
        monkeypatch.setattr(user, "time", Clock)
    return Clock


def test_a_deadline_ends_the_running_epoch_and_the_same_call_goes_on(
    folder: Path, finished: Path, clock: type[Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClockInReproduce, "folder", "plain")
    drawn = folder / "night" / "drawn"
    with pytest.raises(TimeIsUp, match=r"drawn: 2 of 2 runs are left: plain/seed1 \(after epoch 1 "
                                       r"of 2\), sharp/seed1 \(not begun\)"):  # fmt: skip
        table(folder, "night", deadline=5)
    names = {path.name for path in checkpoint_paths(drawn / "plain" / "seed1")}
    assert names == {"checkpoint_0001.pth"}
    assert not (drawn / "sharp").exists()
    rows = json.loads((drawn / "table_2.json").read_text())["rows"]
    assert [(row["seeds"], row["finished_seeds"], row["note"]) for row in rows[:2]] == [
        ([1], [], ""), ([1], [], "")
    ]  # fmt: skip

    # It passes in the last epoch of the first run, which is then finished; the second never begins.
    clock.now = 0.0
    with pytest.raises(TimeIsUp, match=r"1 of 2 runs are left: sharp/seed1 \(not begun\)"):
        table(folder, "night", deadline=5)
    assert not (drawn / "sharp").exists()

    clock.now = 0.0
    whole, said = table(folder, "night", deadline=5)
    assert whole, said
    for row in ("plain", "sharp"):
        one, other = (root / row / "seed1" for root in (finished, drawn))
        results = [json.loads((run / "results.json").read_text())["final"] for run in (one, other)]
        assert results[0] == results[1]
        weights = [load_file(run / "model_final.safetensors") for run in (one, other)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_every_row_gets_a_seed_before_any_gets_the_next(folder: Path) -> None:
    paper = load_paper(folder / "tables.yaml")
    runs, _ = plan_runs(paper, ["plain", "sharp", "known"], "drawn", folder / "none", 2)
    order = [(run.row, run.config.seed) for run in runs]
    assert order == [("plain", 1), ("sharp", 1), ("plain", 2), ("sharp", 2)]


@pytest.mark.parametrize("installed", [False, True])
def test_the_tool_says_what_is_left_and_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    installed: bool,
) -> None:  # fmt: skip
    arguments = ["--tables", str(folder / "tables.yaml"), "--table", "2", "--dataset", "drawn",
                 "--seeds", "2", "--output-dir", str(folder / f"tool{installed}")]  # fmt: skip

    def tool(hours: str) -> tuple[int, str]:
        given = [*arguments, "--hours", hours]
        if installed:
            monkeypatch.setattr(sys, "argv", ["reid", "reproduce", *given])
            return reid_command(), capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["tools/reproduce.py", *given])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        return int(stop.value.code or 0), capsys.readouterr().err

    code, error = tool("1e-9")
    assert code == 3
    assert (
        "drawn: 4 of 4 runs are left: plain/seed1 (not begun), sharp/seed1 (not begun), " in error
    )
    command = shlex.split(error.splitlines()[-1])
    start = ["reid", "reproduce"] if installed else [Path(sys.executable).name, str(TOOL)]
    assert command == [*start, *arguments, "--hours", "1e-9"]
    code, error = tool("0")
    assert (code, error) == (2, "ConfigError: hours: expected more than 0, got 0\n")


def test_report_only_trains_nothing(folder: Path) -> None:
    whole, said = table(folder, "empty", report_only=True)
    assert whole
    assert "0/1" in said
    names = {path.name for path in (folder / "empty" / "drawn").iterdir()}
    assert names == {"table_2.json", "table_2.md", "table_2.txt"}


def test_results_of_fewer_epochs_or_of_nobody_do_not_count(
    folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder / "other" / "drawn" / "plain" / "seed1"
    run.mkdir(parents=True)
    text = (finished / "plain" / "seed1" / "results.json").read_text()
    (run / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=r"seed1: has no config\.yaml"):
        table(folder, "other", report_only=True)
    (run / "config.yaml").write_text((finished / "plain" / "seed1" / "config.yaml").read_text())
    assert "1/1" in table(folder, "other", report_only=True)[1]
    (run / "results.json").write_text(text.replace('"epoch": 2', '"epoch": 1'))
    assert "1/1" not in table(folder, "other", report_only=True)[1]
    (run / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"results\.json: expected the results of a run"):
        table(folder, "other", report_only=True)


def test_a_table_of_counts(folder: Path) -> None:
    whole, said = table(folder, "counts", number=1)
    assert whole
    content = json.loads((folder / "counts" / "drawn" / "table_1.json").read_text())
    assert content["counts"] == {
        "train identities": {"found": 8, "paper": 8},
        "query cameras": {"found": 3, "paper": 4},
    }
    assert "distractors" in said


def test_a_row_without_a_config_for_the_data_set(folder: Path) -> None:
    whole, said = table(folder, "none", dataset="other")
    assert whole
    assert said.count("no config for other") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "darwn"}, "dataset: .*'darwn'.*did you mean 'drawn'"),
        ({"rows": ["plian"]}, "rows: table 2 has .*'plian'.*did you mean 'plain'"),
        ({"rows": ["known"]}, "rows: known cannot be trained: published numbers only"),
        ({"rows": ["plain"], "dataset": "other"}, "plain cannot be trained: no config for other"),
        ({"seeds": 0}, "seeds: expected 1 or more, got 0"),
        ({"number": 3}, "expected one of 1, 2 of .*, got 3"),
        ({"overrides": ["SEED", "3"]}, "SEED: the table sets it"),
        ({"overrides": ["SEDE", "3"]}, r"sede: unknown key .*on the command line"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table(folder, "wrong", **options)


def test_several_processes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="expected one process, not torchrun"):
        table(folder, "several")
