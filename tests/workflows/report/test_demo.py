"""The commands that `make demo` prints at its end work on its run."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reid.config import load_config

ROOT = Path(__file__).parents[3]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def commands(folder: Path) -> list[list[str]]:
    """The commands that the demo prints, for a run in `folder`, without the interpreter."""
    printed = re.findall(r'@echo "  .*?(\$\(BIN\)/python .*)"$', MAKEFILE, re.MULTILINE)
    here = [line.replace("$(DEMO_DIR)", str(folder)) for line in printed]
    parts = [part.replace("$(BIN)/python", "") for line in here for part in line.split("&&")]
    return [shlex.split(part) for part in parts]


@pytest.mark.page
def test_the_next_commands_work(
    train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = MAKEFILE[MAKEFILE.index("\ndemo:") : MAKEFILE.index("\ntest:")]
    (config,) = set(re.findall(r"--config-file (projects\S+)", recipe))
    short = ("DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2")
    folder = train_tiny(ROOT / config, "demo", *short)
    assert (folder / "report.html").is_file()
    found = commands(folder)
    assert [command[0] for command in found] == [
        "tools/visualize.py", "tools/train_net.py", "tools/train_net.py", "tools/report.py",
    ]  # fmt: skip
    for command in found:
        if "CLUSTERER.EPS" in command:  # this one trains as long as the demo
            assert load_config(command[2], command[3:]).output_dir == f"{folder}_eps"
            train_tiny(ROOT / command[2], "demo_eps", *short)
            continue
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        assert stop.value.code == 0, command
    for name in ("demo/cameras.png", "demo_flip/results_eval_only.json", "demo_eps/beside.html"):
        assert (tmp_path / name).is_file(), name
