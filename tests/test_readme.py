"""What the README says is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reid.config import load_config
from reid.engine.run import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_plug_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) < 25
    (tmp_path / "my_reid.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    (pairs,) = re.findall(r'PLUGINS "(.*?)" CLUSTERER "(.*?)"\n', README)
    config = load_config(
        ROOT / "projects" / "TMGF" / "configs" / "demo.yaml",
        ["PLUGINS", pairs[0], "CLUSTERER", pairs[1], "OUTPUT_DIR", str(tmp_path / "out"),
         "DATASETS.TRAIN", "{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 4}",
         "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "SOLVER.MAX_EPOCHS", "1"],
    )  # fmt: skip
    train(config)
    assert (tmp_path / "out" / "model_final.safetensors").exists()


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"),
             *ROOT.glob("projects/*/README.md"), ROOT / "datasets" / "README.md"]  # fmt: skip
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    code = """
import logging, os, sys, threading
before = (sorted(os.listdir(".")), dict(os.environ))
import reid
assert "torch" not in sys.modules
import reid.engine.run
assert not logging.getLogger().handlers and not logging.getLogger("reid").handlers
assert (sorted(os.listdir(".")), dict(os.environ)) == before
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
