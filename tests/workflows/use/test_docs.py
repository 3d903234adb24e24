"""The Python of docs/use.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from tests.workflows.use.conftest import Run

PAGE = Path(__file__).parents[3] / "docs" / "use.md"


def test_the_python_of_the_page(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    Path("logs/run").symlink_to(run.folder)
    for seed, name in enumerate(("a.jpg", "b.jpg")):
        noise = np.random.default_rng(seed).integers(0, 256, (60, 30, 3), np.uint8)
        Image.fromarray(noise).save(name)
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["features"].shape == (2, 24)
    assert -1 <= names["similarity"] <= 1
    exec(second, names)
    assert names["features"].shape == (2, 24)
