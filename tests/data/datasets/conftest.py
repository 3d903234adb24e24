"""A temporary root of datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

Plant = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    return tmp_path


@pytest.fixture
def plant(root: Path) -> Plant:
    """Makes empty files in a folder below the root: a dataset does not open its images."""

    def make(folder: str, names: Iterable[str]) -> Path:
        for name in names:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root / folder

    return make
