"""The examples of docs/extending.md are short, and run unchanged."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from reid.config import load_config
from reid.workflows.train import train

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
EXAMPLES = re.findall(r"\n## (.+?)\n.*?```python\n(.*?)```\n\n```yaml\n(.*?)```", PAGE, re.DOTALL)
BASE = """
DATASETS:
  TRAIN: {NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2,
          HEIGHT: 48, WIDTH: 32}
INPUT: {SIZE: [48, 32]}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {NAME: ProxyBalancedSampler, BATCH_SIZE: 16, IMAGES_PER_PROXY: 4, STEPS_PER_EPOCH: 2}
MODEL:
  BACKBONE: {NAME: IBNViT, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 3, STEM_CHANNELS: 8, DROP_PATH: 0}
  HEAD: BNNeckHead
CRITERION: [O2CAPLoss]
CLUSTERER: {NAME: CameraProxyClusterer, K1: 6, K2: 2, EPS: 0.8, MIN_SAMPLES: 2}
SOLVER: {MAX_EPOCHS: 2}
DEVICE: cpu
"""


def test_each_seam_has_an_example_of_under_thirty_lines() -> None:
    assert [title for title, _, _ in EXAMPLES] == [
        "A loss", "A memory", "A refiner of labels", "A teacher", "A second domain",
        "A head with parts", "A column in the batch", "A hook", "A map beside the image",
    ]  # fmt: skip
    assert PAGE.count("```python") == len(EXAMPLES)
    for title, code, _ in EXAMPLES:
        body = [node for node in ast.parse(code).body
                if not isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
        first = min(getattr(node, "decorator_list", [node])[0].lineno for node in body)
        assert len(code.splitlines()) - first < 30, title


@pytest.mark.parametrize(("title", "code", "settings"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_it_runs(
    title: str,
    code: str,
    settings: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path_factory.getbasetemp() / "drawn_once"))
    monkeypatch.syspath_prepend(tmp_path)
    name = "example_" + re.sub(r"\W", "_", title.lower())
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "run.yaml").write_text(
        f"_BASE_: base.yaml\nPLUGINS: [tmgf, {name}]\n{settings}OUTPUT_DIR: {tmp_path / 'run'}\n"
    )
    train(load_config(tmp_path / "run.yaml"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["final"][0]["numbers"]["mAP"] > 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.json").read_text().splitlines())
    assert [line["epoch"] for line in lines if line["kind"] == "train"] == [0, 1]
