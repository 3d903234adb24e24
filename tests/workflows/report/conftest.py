"""Handmade folders of runs, with just the files that a report reads."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

METRICS = {"mAP": 0.5, "Rank-1": 0.6}
LABELS = {
    "clusters": 40, "proxies": 90, "outliers": 100, "images/cluster": 10.0, "largest": 30,
    "cross-camera": 0.59, "silhouette": 0.2, "agreement": 0.8, "purity": 0.9, "ARI": 0.7,
}  # fmt: skip
LOG = """\
11-27 10:00:00  Environment
python       3.11.7 on Linux
device       cpu
11-27 10:00:01  Config
SEED: 1
11-27 10:00:02  WARNING: first of all
11-27 10:00:03  an unfinished line
"""


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run of three epochs; keyword arguments replace the content of its files."""

    def make(
        name: str = "run",
        *,
        images: str = "{}.png",
        test_set: str = "Drawn",
        loss: str = "triplet",
        finished: bool = True,
        without: tuple[str, ...] = (),
        **settings: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        paths = [str(folder / images.format(i)) for i in range(6)]
        for i, path in enumerate(paths):
            Image.new("RGB", (32, 64), (40 * i, 90, 160)).save(path, format="PNG")
        files = {
            "config.yaml": _config(**settings),
            "metrics.json": _metrics(test_set, loss),
            "results.json": json.dumps(_results(test_set, paths)),
            "log.txt": LOG,
            "clusters.csv": _clusters(paths),
            "matches.csv": _matches(paths),
        }
        if not finished:
            without = (*without, "results.json", "clusters.csv", "matches.csv", "pictures")
        for file, text in files.items():
            if file not in without:
                data = text.encode("utf-8", "surrogateescape")
                (folder / file).write_bytes(data)
        if "pictures" not in without:
            for picture in ("ranked_lists", "similarities", "clusters", "matches"):
                Image.new("RGB", (600, 400), "white").save(folder / f"{picture}.png")
        if finished:
            (folder / "model_final.safetensors").touch()
        return folder

    return make


def _config(**settings: Any) -> str:
    tree: dict[str, Any] = {
        "DATALOADER": {"NUM_WORKERS": 2},
        "CRITERION": [{"NAME": "O2CAPLoss", "TEMPERATURE": 0.07}],
        "CLUSTERER": {"NAME": "JaccardDBSCAN", "EPS": 0.5},
        "SOLVER": {"BASE_LR": 0.01, "MAX_EPOCHS": 3},
        "TEST": {"RANKED_LISTS": 8},
        "OUTPUT_DIR": "logs/run",
    }
    return str(yaml.safe_dump(tree | settings, sort_keys=False))


def _metrics(test_set: str, loss: str) -> str:
    lines: list[dict[str, Any]] = []
    for epoch in range(3):
        step = 10 * epoch
        labels = LABELS | {"outliers": 130 - 10 * epoch, "extraction_time": 2, "label_time": 1}
        lines.append({"kind": "labels", "step": step, "epoch": epoch, **labels})
        for done in (5, 10):
            value = 3 - (step + done) / 10
            numbers = {"loss": value, loss: value, "lr": 0.01, "data_time": 0.1, "step_time": 0.4}
            lines.append({"kind": "train", "step": step + done, "epoch": epoch, **numbers})
        scores = {f"{test_set}/{name}": v + 0.1 * epoch for name, v in METRICS.items()}
        lines.append({"kind": "test", "step": step + 10, "epoch": epoch + 1, **scores})
    return "".join(json.dumps(line) + "\n" for line in lines)


def _results(test_set: str, paths: list[str]) -> dict[str, Any]:
    scores = [{name: value + 0.1 * i for name, value in METRICS.items()} for i in range(3)]
    history = [
        {"test_set": test_set, "epoch": epoch, "numbers": numbers}
        for epoch, numbers in enumerate(scores, 1)
    ]
    details = {
        "hardest_queries": [2, 0],
        "hardest_query_paths": [paths[2], paths[0]],
        "camera_pairs": {
            "query_cameras": [0, 1],
            "gallery_cameras": [0, 1],
            "mAP": [[None, 0.8], [0.6, None]],
        },
        "per_query_AP": [0.3, 0.9, 0.05, None],
    }
    splits = [("train", 500, 45, 3), ("query", 4, 2, 2), ("gallery", 1234, 2, 2)]
    return {
        "final": [{**history[-1], **details}],
        "best_chosen_by": f"mAP on the test set {test_set}",
        "history": history,
        "provenance": {
            "git": {"commit": "c0ffee", "dirty": True},
            "data": [
                {"dataset": test_set, "split": split, "images": images, "identities": persons,
                 "cameras": cameras, "version": ""}
                for split, images, persons, cameras in splits
            ],
            "seed": 1, "device": "cpu", "processes": 1, "python": "3.11.7",
            "libraries": {"torch": "2.6"}, "date": "2026-11-27T10:00:00+00:00",
        },
    }  # fmt: skip


def _clusters(paths: list[str]) -> str:
    facts = [(0, "left", 0.9), (0, "right", 0.8), (1, "left", 0.2), (1, "left", 0.1), (-1, "", "")]
    rows = [(path, *fact) for path, fact in zip(paths, facts, strict=False)]
    return _csv([("path", "cluster", "camera", "confidence"), *rows])


def _matches(paths: list[str]) -> str:
    header = ("path", "other_path", "camera", "other_camera", "similarity", "cluster")
    return _csv([header, (paths[0], paths[1], "left", "right", 0.987, 0)])


def _csv(rows: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
