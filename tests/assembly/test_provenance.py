from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from reid.assembly.provenance import config_diff, config_hash, git_state, provenance
from reid.config import Config, dump_config, load_config


def test_results_say_where_they_come_from() -> None:
    config = load_config(None, ["SEED", "7"])
    data = [{"dataset": "A", "split": "train", "images": 3}]
    found = provenance(config, torch.device("cpu"), data)
    assert found["data"] == data
    assert (found["seed"], found["device"], found["processes"]) == (7, "cpu", 1)
    assert found["libraries"]["torch"] == torch.__version__.split("+")[0] or (
        found["libraries"]["torch"] == torch.__version__
    )
    assert {"timm", "numpy", "faiss-cpu"} <= found["libraries"].keys()
    assert found["date"].endswith("+00:00")
    assert len(found["config_hash"]) == 64


def test_the_commit_and_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "reid" / "provenance.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr("reid.assembly.provenance.__file__", str(source))
    assert git_state() is None
    git("init", "-q")
    assert git_state() is None  # a repository that does not hold this code
    git("add", ".")
    git("commit", "-qm", "x")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "untracked").write_text("")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("1")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


def changed(*pairs: str) -> Config:
    return load_config(None, pairs)


def test_runs_of_one_experiment_have_the_same_hash() -> None:
    first = config_hash(changed())
    assert first == config_hash(changed("OUTPUT_DIR", "x", "DEVICE", "cpu", "LOG_PERIOD", "3"))
    assert first == config_hash(changed("PROCESS_TIMEOUT", "90", "TEST.RANKED_LISTS", "5"))
    others = [("SEED", "2"), ("TEST.FLIP", "true"), ("SOLVER.BASE_LR", "1"), ("CLUSTERER", "A")]
    assert len({first, *(config_hash(changed(*pair)) for pair in others)}) == 5


@pytest.mark.parametrize(
    ("pair", "other_course"),
    [
        (("OUTPUT_DIR", "x"), False),
        (("PROCESS_TIMEOUT", "90"), False),
        (("TEST.BATCH_SIZE", "3"), False),
        (("TEST.PRECISION", "bf16"), True),
        (("SOLVER.ON_NONFINITE", "skip"), False),
        (("SOLVER.BASE_LR", "1"), True),
        (("DATALOADER.SAMPLER", "A"), True),
    ],
)
def test_a_diff_of_configs(tmp_path: Path, pair: tuple[str, str], other_course: bool) -> None:
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(changed()))
    assert config_diff(stored, changed()) == ("", False)
    difference, other = config_diff(stored, changed(*pair))
    assert other is other_course
    assert str(stored) in difference
    assert [line[0] for line in difference.splitlines()[3:] if line[0] != " "].count("+") >= 1
    stored.write_text("SEED: 1\n")  # as an older version with fewer settings wrote it
    assert config_diff(stored, changed()) == ("", False)
