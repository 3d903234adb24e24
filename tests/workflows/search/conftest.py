"""A small gallery made of a file of features, and of pictures that are on disk."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from reid.evaluation.feature_rows import FeatureRows, write_feature_rows

MODEL = "f" * 64
TOOL = Path(__file__).parents[3] / "tools" / "search.py"


class People(NamedTuple):
    """Six persons, four pictures of each, in three cameras; the last four are queries."""

    folder: Path
    gallery: Path
    features: Path
    paths: list[str]

    def write(self, name: str, paths: list[str], features: Any, fingerprint: str = MODEL) -> Path:
        """A file of features in the folder."""
        return write_rows(self.folder / name, paths, features, fingerprint)

    @staticmethod
    def make(persons: list[int], dim: int = 16, seed: int = 0) -> Any:
        """Features of pictures of these persons."""
        return make_features(persons, dim, seed)


def write_rows(path: Path, paths: list[str], features: Any, fingerprint: str = MODEL) -> Path:
    count = len(paths)
    rows = FeatureRows(
        features=np.asarray(features, np.float32),
        paths=paths,
        cameras=[f"camera{row % 3}" for row in range(count)],
        splits=[""] * count,
        pids=np.full(count, -1),
        camids=np.arange(count) % 3,
        provenance={"fingerprint": fingerprint, "weights": "", "weights_sha256": "0" * 64},
    )
    write_feature_rows(path, rows)
    return path


def make_features(persons: list[int], dim: int = 16, seed: int = 0) -> Any:
    centres = np.random.default_rng(5).normal(size=(max(persons) + 1, dim))
    noise = np.random.default_rng(seed).normal(size=(len(persons), dim))
    features = centres[persons] + 0.2 * noise
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """tools/search.py; gives its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        return int(stop.value.code or 0)

    return run


@pytest.fixture
def people(tmp_path: Path, run_tool: Callable[..., int]) -> People:
    paths = []
    for row in range(24):
        path = tmp_path / "crops" / f"{row // 4}_{row % 4}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 16), (10 * row, 40 * (row // 4), 90)).save(path)
        paths.append(str(path))
    persons = [row // 4 for row in range(24)]
    features = write_rows(tmp_path / "all.npz", paths, make_features(persons))
    gallery = tmp_path / "people"
    assert run_tool("build", gallery, features) == 0
    return People(tmp_path, gallery, features, paths)
