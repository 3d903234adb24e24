"""The job that goes into Slurm's queue; the queue itself is a stand-in."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "submit.py"
ARGUMENTS = ["--nodes", "2", "--gpus-per-node", "4", "--hours", "1.5", "--partition", "gpu",
             "--", "--config-file", "a.yaml", "OUTPUT_DIR", "logs/a"]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["submit.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(stop.value.code or 0)


def test_a_job_is_torchrun_on_every_machine_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    submitted: list[Any] = []
    parameters: dict[str, Any] = {}

    def submit(job: Any) -> SimpleNamespace:
        submitted.append(job)
        return SimpleNamespace(job_id="17", paths=SimpleNamespace(stdout="logs/slurm/17.out"))

    executor = SimpleNamespace(
        update_parameters=lambda **given: parameters.update(given), submit=submit
    )
    stand_in = SimpleNamespace(
        AutoExecutor=lambda folder: executor,
        helpers=SimpleNamespace(DelayedSubmission=lambda job: ("again", job)),
    )
    monkeypatch.setitem(sys.modules, "submitit", stand_in)
    assert run(monkeypatch, *ARGUMENTS) == 0
    assert "job 17" in capsys.readouterr().out
    assert parameters["nodes"] == 2
    assert parameters["tasks_per_node"] == 1
    assert parameters["cpus_per_task"] == 32
    assert parameters["timeout_min"] == 90
    assert parameters["slurm_partition"] == "gpu"
    (job,) = submitted
    command = job.command("node0", "17")
    assert command[1:9] == [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "4", "--rdzv-id", "17",
    ]  # fmt: skip
    assert command[-6:] == [
        "tools/train_net.py", "--config-file", "a.yaml", "OUTPUT_DIR", "logs/a", "--resume",
    ]  # fmt: skip
    assert job.checkpoint() == ("again", job)


def test_without_submitit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run(monkeypatch, *ARGUMENTS) == 2
    assert "pip install submitit" in capsys.readouterr().err


def test_logs_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace())
    (tmp_path / "file").touch()
    assert run(monkeypatch, "--logs", str(tmp_path / "file" / "logs"), *ARGUMENTS) == 2
    assert f"OutputError: {tmp_path / 'file' / 'logs'}: cannot be" in capsys.readouterr().err
