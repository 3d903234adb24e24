"""The README is true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reid.assembly.data import build_datasets
from reid.config import load_config
from reid.data.datasets import ReIDDataset
from reid.registry import DATASET, build
from reid.workflows.train import train

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
         "DATASETS.TRAIN", "{NAME: SyntheticPersons, NUM_TRAIN: 16, NUM_TEST: 4}",
         "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "SOLVER.MAX_EPOCHS", "1"],
    )  # fmt: skip
    train(config)
    assert (tmp_path / "out" / "model_final.safetensors").exists()
    metrics = (tmp_path / "out" / "metrics.json").read_text("utf-8").splitlines()
    (labels,) = [line for line in map(json.loads, metrics) if line["kind"] == "labels"]
    assert labels["clusters"] > 20  # not all images in one


def test_datasets_of_the_commands_are_built() -> None:
    specs = re.findall(r'DATASETS\.TRAIN "(.*?)"( |$)', README, re.MULTILINE)
    names = []
    for spec, _ in specs:
        config = load_config(None, ["DATASETS.TRAIN", spec])
        (dataset,) = build_datasets(config.datasets.train, "datasets.train")
        names.append(type(dataset).__name__)
    assert names == ["Folder", "Pattern", "CSV"]


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"),
             *ROOT.glob("projects/*/README.md"), ROOT / "datasets" / "README.md"]  # fmt: skip
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_page_on_datasets_tells_names_and_published_counts() -> None:
    page = (ROOT / "datasets" / "README.md").read_text("utf-8")
    for name, made_by in DATASET:
        if not made_by.__module__.startswith("reid."):
            continue  # one that another test has registered
        assert f"{{NAME: {name}" in page, f"datasets/README.md does not tell of {name}"
    withdrawn = {"accept_withdrawn": True}
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "`Market1501`": ("Market1501", {}),
        "`MSMT17`": ("MSMT17", {}),
        "`CUHK03NP` labelled": ("CUHK03NP", {"boxes": "labelled"}),
        "`CUHK03NP` detected": ("CUHK03NP", {"boxes": "detected"}),
        "`CUHKSYSU`": ("CUHKSYSU", {}),
        "`PersonX`": ("PersonX", {}),
        "`RandPerson`": ("RandPerson", {}),
        "`DukeMTMCreID`": ("DukeMTMCreID", withdrawn),
        "`OccludedDuke`": ("OccludedDuke", withdrawn),
        "`VeRi776`": ("VeRi776", {}),
    }
    for size in (800, 1600, 2400):
        variants[f"`VehicleID` {size}"] = ("VehicleID", {"test_size": size})
    for size in (3000, 5000, 10000):
        variants[f"`VeRiWild` {size}"] = ("VeRiWild", {"test_size": size})
    rows = {
        cells[0]: cells[1:]
        for line in page.partition("### Published counts")[2].splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 7
    }
    assert {name for name, _ in variants.values()} == {
        name for name, part in DATASET if part.published is not ReIDDataset.published
    }
    for row, (name, options) in variants.items():
        published = build(DATASET, {"name": name, **options}, "row").published()
        splits = [published.get(split) for split in ("train", "query", "gallery")]
        expected = [
            f"{split.identities:,} / {'—' if split.images is None else f'{split.images:,}'}"
            if split
            else ""
            for split in splits
        ]
        assert rows[row][:3] == expected, row
        cameras = published["train"].cameras
        told = {None: "—", 0: "none known"}.get(cameras, str(cameras))
        assert rows[row][3].startswith(told), row


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    code = """
import logging, os, sys, threading
before = (sorted(os.listdir(".")), dict(os.environ))
import reid
assert "torch" not in sys.modules
import reid.workflows.train
assert not logging.getLogger().handlers and not logging.getLogger("reid").handlers
assert (sorted(os.listdir(".")), dict(os.environ)) == before
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
