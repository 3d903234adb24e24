"""The tool on a run: a real process, killed and started again, and what is made of its list."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reid.config import load_config
from reid.registry import ConfigError
from reid.workflows.evaluate import evaluate
from reid.workflows.review import review
from reid.workflows.review.source import open_source
from reid.workflows.train import train

ROOT = Path(__file__).parents[3]
PERSONS, CAMERAS, EACH = 24, 3, 2
SETTINGS = """
DATASETS: {TRAIN: {NAME: Folder, PATH: own}}
INPUT: {SIZE: [32, 16]}
DATALOADER: {NUM_WORKERS: 0, SAMPLER: {NAME: PKSampler, BATCH_SIZE: 8, STEPS_PER_EPOCH: 1}}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CLUSTERER: {NAME: JaccardDBSCAN, EPS: 0.6, MIN_SAMPLES: 2}
CRITERION: [Triplet]
SOLVER: {OPTIMIZER: Adam, MAX_EPOCHS: 1, WARMUP_EPOCHS: 0, MILESTONES: []}
HOOKS: [WriteClusters]
TEST: {FLIP: true}
DEVICE: cpu
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`data/own` with persons as stripes of colour, and `run`, trained on it for a step."""
    folder = tmp_path_factory.mktemp("review")
    for number in range(PERSONS * CAMERAS * EACH):
        person, camera, shot = _facts(number)
        path = folder / "data" / "own" / f"cam{camera}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (16, 32), (97 * person % 256, 31 * person % 256, 40 * camera))
        image.paste((193 * person % 256, 20 * shot, 59 * person % 256), (0, 16, 16, 32))
        image.save(path)
    (folder / "config.yaml").write_text(SETTINGS)
    before = os.environ.get("REID_DATASETS")
    os.environ["REID_DATASETS"] = str(folder / "data")
    train(load_config(folder / "config.yaml", ["OUTPUT_DIR", str(folder / "run")]))
    yield folder
    if before is None:
        del os.environ["REID_DATASETS"]
    else:
        os.environ["REID_DATASETS"] = before


def _facts(number: int) -> tuple[int, int, int]:
    return number // (CAMERAS * EACH), number // EACH % CAMERAS, number % EACH


class Tool:
    """`tools/review.py` as a process of its own."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, str(ROOT / "tools" / "review.py"), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("Open "):
                break
        else:
            pytest.fail("".join(lines))
        self.url = line.split()[1]

    def call(self, path: str, body: Any = None) -> Any:
        origin = "/".join(self.url.split("/")[:3])
        headers = {"Content-Type": "application/json", "Origin": origin}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def answer(self, page: Any) -> Any:
        question = page["question"]
        truth = {i["number"]: _facts(int(i["name"][:4]))[0]
                 for i in (*question["anchor"], *question["images"])}  # fmt: skip
        images = [i["number"] for i in question["images"]]
        query = question["anchor"][0]["number"]
        marked = [i for i in images if truth[i] == truth[query]]
        verdict = "same" if marked else "different"
        body = {"key": question["key"], "verdict": verdict, "marked": marked, "view": "random"}
        return self.call("api/answer", body)

    def end(self, signum: int) -> tuple[int, str]:
        assert self.process.stdout is not None
        self.process.send_signal(signum)
        rest = self.process.stdout.read()
        self.process.stdout.close()
        return self.process.wait(60), rest


@pytest.mark.slow
def test_killed_reviewed_scored_and_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = folder / "data" / "own" / "labels.csv"
    arguments = (folder / "run", "--port", 0, "--labels", labels)
    tool = Tool(*arguments)
    page = tool.call("api/question?view=random")
    for _ in range(20):
        page = tool.answer(page)
    tool.end(signal.SIGKILL)
    assert not labels.exists()

    tool = Tool(*arguments)
    page = tool.call("api/question?view=random")
    assert page["counts"]["answers"] == 20
    with pytest.raises(ConfigError, match=r"--folder: .*is in use by process"):
        review(folder / "run", write_only=True)
    for _ in range(40):
        page = tool.answer(page)
    figures = tool.call("api/figures")
    assert figures["random"]["answered"] == 60
    assert "with flip-test" in figures["settings"]
    code, said = tool.end(signal.SIGTERM)
    assert code == 0
    assert f"Written to {labels}" in said

    commands = [shlex.split(line) for line in said.splitlines() if "train_net.py" in line]
    assert len(commands) == 2
    pairs = commands[0][commands[0].index("--eval-only") + 1 :]
    config = load_config(Path(commands[0][3]), pairs)
    config.output_dir = str(folder / "scored")
    ((_, numbers),) = evaluate(config).items()
    assert numbers["mAP"] == pytest.approx(figures["labelled"]["mAP"]["value"], abs=1e-6)
    assert numbers["Rank-1"] == pytest.approx(figures["labelled"]["rank1"]["value"], abs=1e-6)

    pairs = [word.replace("BATCH_SIZE: 32", "BATCH_SIZE: 8") for word in commands[1][4:]]
    config = load_config(Path(commands[1][3]), pairs)
    config.output_dir = str(folder / "trained")
    train(config)
    assert (folder / "trained" / "model_final.safetensors").exists()

    before = labels.read_bytes()
    review(folder / "run", labels=labels, write_only=True)
    assert labels.read_bytes() == before
    assert re.search(r"Written to .*labels\.csv: \d+ persons", capsys.readouterr().out)


def test_features_are_kept_and_made_anew(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = folder / "run"
    first = open_source(run, tmp_path)
    assert first.clusters_from.startswith("clusters.csv")
    written = (tmp_path / "features.safetensors").stat().st_mtime_ns
    again = open_source(run, tmp_path)
    assert (tmp_path / "features.safetensors").stat().st_mtime_ns == written
    assert again.features.test.equal(first.features.test)
    assert (again.cluster == first.cluster).all()
    assert (again.features.pids == -1).all()
    other = open_source(run, tmp_path, ["TEST.FLIP", "false"])
    assert other.fingerprint != first.fingerprint
    assert not other.features.test.equal(first.features.test)
    (tmp_path / "features.safetensors").write_bytes(b"nonsense")
    assert open_source(run, tmp_path).features.test.equal(first.features.test)
    (run / "clusters.csv").rename(tmp_path / "away.csv")
    try:
        assert "made for this review" in open_source(run, tmp_path).clusters_from
    finally:
        (tmp_path / "away.csv").rename(run / "clusters.csv")


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        review(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        review(tmp_path)
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        review(tmp_path, test_share=2)
    monkeypatch.setattr("reid.workflows.extras.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'reid\[serve\]'"):
        review(tmp_path)
