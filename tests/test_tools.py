"""All tools report output that they cannot write in one line."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reid.modeling.backbones import TimmBackbone
from reid.modeling.heads import BNNeckHead
from reid.modeling.model import ReIDModel
from reid.modeling.weights import save_weights

TOOLS = Path(__file__).parents[1] / "tools"
DATA = ("SyntheticPersons", "NUM_TRAIN", "3", "NUM_TEST", "2", "NUM_CAMERAS", "2",
        "NUM_DISTRACTORS", "1", "HEIGHT", "16", "WIDTH", "8")  # fmt: skip
TABLES = """
paper: A paper
data_config: "{dataset}.yaml"
metrics: [mAP]
datasets: {drawn: {label: Drawn}}
methods: {known: {label: Known, published: {drawn: [90]}}}
tables: {2: {title: Rows, datasets: [drawn], rows: {known: ""}}}
"""
OUTPUT = "in_the_way/output"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with input for each tool, and a file where a folder is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REID_DATASETS", str(tmp_path / "data"))
    backbone = TimmBackbone("test_resnet", (64, 32))
    torch.save(backbone.net.state_dict(), "weights.pth")
    made_by = {"backbone": {"name": "TimmBackbone", "model": "test_resnet"}, "image_size": [64, 32]}
    save_weights(
        Path("model.safetensors"),
        ReIDModel(backbone, BNNeckHead(backbone)).state_dict(),
        {key: json.dumps(value) for key, value in made_by.items()},
    )
    rows = {"feat": np.eye(4, 3), "pids": np.array([0, 0, 1, 1]), "camids": np.arange(4) % 2}
    arrays = {f"{split}_{name}": a for split in ("query", "gallery") for name, a in rows.items()}
    np.savez("features.npz", **arrays)
    Image.new("RGB", (8, 16), "red").save("crop.png")
    (tmp_path / "config.yaml").write_text("DATASETS: {TRAIN: SyntheticPersons}")
    (tmp_path / "tables.yaml").write_text(TABLES)
    (tmp_path / "in_the_way").write_text("a file where a folder should be")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("train_net", ["--config-file", "config.yaml", "OUTPUT_DIR", OUTPUT]),
        ("convert_weights", ["weights.pth", OUTPUT, "--format", "resnet", "--partial"]),
        ("evaluate", ["features.npz", "--output", OUTPUT]),
        ("visualize", ["histogram", "--features", "features.npz", "--output", OUTPUT]),
        ("visualize", ["embed", "--features", "features.npz", "--output", OUTPUT]),
        ("check_data", [*DATA, "--json", OUTPUT]),
        ("check_data", [*DATA, "--fix-list", OUTPUT]),
        ("export_crops", [OUTPUT, *DATA]),
        (
            "extract",
            [
                "--model",
                "model.safetensors",
                "--output",
                f"{OUTPUT}.npz",
                "--workers",
                "0",
                "--dataset",
                *DATA,
            ],
        ),
        ("search", ["build", OUTPUT, "crop.png", "--model", "model.safetensors"]),
        ("reproduce", ["--tables", "tables.yaml", "--table", "2", "--output-dir", OUTPUT]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_output_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"OutputError: {OUTPUT}")
    assert "cannot be written (" in last
