"""Real runs are ended by real signals at random moments and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reid.engine.hooks.checkpoints import newest_checkpoint
from reid.modeling.weights import read_checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = """
DATASETS:
  TRAIN: {NAME: SyntheticPersons, NUM_TRAIN: 6, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2,
          HEIGHT: 32, WIDTH: 16}
INPUT: {SIZE: [32, 16]}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {NAME: PKSampler, BATCH_SIZE: 8, STEPS_PER_EPOCH: 3}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CLUSTERER: {NAME: JaccardDBSCAN, K1: 6, K2: 2, EPS: 0.8, MIN_SAMPLES: 2}
CRITERION: [Triplet]
SOLVER: {OPTIMIZER: Adam, MAX_EPOCHS: 4, WARMUP_EPOCHS: 1, MILESTONES: [2]}
TEST: {EVAL_PERIOD: 1}
DEVICE: cpu
LOG_PERIOD: 1
"""
# Imports torch once and forks for each run, which saves seconds per run.
LAUNCHER = """
import json, os, runpy, signal, sys, traceback
import torch
from reid.engine.hooks import evaluate as hooks
from reid.modeling import weights
torch.set_num_threads(1)
main = runpy.run_path("tools/train_net.py")["main"]

def die_within_checkpoint(number):
    begun = []
    class File(weights._ErrorKeepingFile):
        def write(self, data):
            if not begun or begun[-1] is not self:
                begun.append(self)
            if len(begun) == number:
                super().write(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)
    weights._ErrorKeepingFile = File

def die_within_evaluation():
    hooks.evaluate = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.argv = ["tools/train_net.py", *order["arguments"]]
        if order["checkpoint"]:
            die_within_checkpoint(order["checkpoint"])
        if order["evaluation"]:
            die_within_evaluation()
        code = 1
        try:
            code = main()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    sys.stdin.readline()  # until then the process has its number, dead or alive
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Launcher:
    """Starts runs of `CONFIG`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run.yaml").write_text(CONFIG)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LAUNCHER],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "REID_DATASETS": str(folder / "datasets")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(
        self, output: str, *options: str, checkpoint: int = 0, evaluation: bool = False
    ) -> int:
        """Starts the process of a run.

        If asked, it dies in the middle of the checkpoint with this number or of the first
        evaluation.
        """
        arguments = ["--config-file", str(self.folder / "run.yaml"), *options]
        arguments += ["OUTPUT_DIR", str(self.folder / output)]
        order = {
            "arguments": arguments,
            "checkpoint": checkpoint,
            "evaluation": evaluation,
            "log": str(self.folder / f"{output}.txt"),
        }
        (self.folder / f"{output}.txt").write_text("")
        self._write(json.dumps(order))
        return int(self._read())

    def wait(self) -> int:
        """The exit code of the latest run; below 0 if a signal killed it."""
        self._write("wait")
        return os.waitstatus_to_exitcode(int(self._read()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    started = Launcher(tmp_path_factory.mktemp("kills"))
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def seconds(launcher: Launcher) -> float:
    """How long an uninterrupted run takes; its output is in `whole`."""
    launcher.start("warm_up")  # draws the data set, compiles
    assert launcher.wait() == 0, (launcher.folder / "warm_up.txt").read_text()
    started = time.monotonic()
    launcher.start("whole")
    assert launcher.wait() == 0, (launcher.folder / "whole.txt").read_text()
    return time.monotonic() - started


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.json without times and without a last line that was cut off."""
    lines = []
    if (folder / "metrics.json").exists():
        for text in (folder / "metrics.json").read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            clocks = ("data_time", "step_time", "memory_mb", "extraction_time", "label_time")
            lines.append({key: value for key, value in line.items() if key not in clocks})
    return lines


def check_that_only_the_open_epoch_is_lost(folder: Path) -> None:
    lines = [line for line in metrics(folder) if line["kind"] in ("labels", "test")]
    open_epoch = max((line["epoch"] for line in lines), default=0)
    found = newest_checkpoint(folder)
    assert open_epoch <= (0 if found is None else found[1]["epoch"])


def check_that_the_end_is_the_same(whole: Path, folder: Path) -> None:
    for name in ("model_final.safetensors", "model_best.safetensors"):
        expected, state = read_checkpoint(whole / name)[0], read_checkpoint(folder / name)[0]
        assert expected.keys() == state.keys()
        assert all(torch.equal(expected[key], state[key]) for key in expected)
    assert metrics(folder) == metrics(whole)
    results = [json.loads((run / "results.json").read_text()) for run in (whole, folder)]
    for result in results:
        result.pop("provenance")
    assert results[0] == results[1]
    assert {path.name for path in folder.glob(".*")} == set()
    assert sorted(path.name for path in folder.glob("checkpoint*")) == [
        "checkpoint_0003.pth",
        "checkpoint_0004.pth",
    ]


def kill_and_resume(launcher: Launcher, seconds: float, kills: int, seed: int) -> None:
    """Kills runs `kills` times in all, each run up to four times, in one of four ways."""
    draw = random.Random(seed)
    done, number = 0, 0
    while done < kills:
        number += 1
        folder = launcher.folder / f"killed_{seed}_{number}"
        for attempt in range(5):
            ways = ["kill", "kill", "checkpoint", "evaluation", "term"]
            way = draw.choice(ways) if attempt < 4 else "none"
            if kills <= 3:
                way = ["evaluation", "checkpoint", "kill", "term", "none"][attempt]
            pid = launcher.start(
                folder.name,
                "--resume",
                checkpoint=draw.randint(1, 2) if way == "checkpoint" else 0,
                evaluation=way == "evaluation",
            )
            if way in ("kill", "term"):
                time.sleep(draw.uniform(0.1, 0.9) * seconds)
                os.kill(pid, signal.SIGKILL if way == "kill" else signal.SIGTERM)
            code = launcher.wait()
            said = (launcher.folder / f"{folder.name}.txt").read_text()
            if code == 0:
                break
            # Before our handler is installed, SIGTERM ends Python without a message.
            early = -signal.SIGTERM if "Environment" not in said else 143
            assert code in (-signal.SIGKILL, 143, early), said
            if code == 143:
                assert "SIGTERM has ended the run" in said
                assert "tools/train_net.py --resume --config-file" in said
            done += 1
            check_that_only_the_open_epoch_is_lost(folder)
            assert way != "evaluation" or newest_checkpoint(folder) is not None
        assert code == 0, said
        check_that_the_end_is_the_same(launcher.folder / "whole", folder)


def test_killed_runs_go_on(launcher: Launcher, seconds: float) -> None:
    kill_and_resume(launcher, seconds, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_runs_killed_fifty_times_go_on(launcher: Launcher, seconds: float, seed: int) -> None:
    kill_and_resume(launcher, seconds, kills=10, seed=seed)
