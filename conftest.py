"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Folder with the numbers computed with the authors' code."""
    default = Path(__file__).parents[1] / "shared" / "oracles"
    folder = Path(os.environ.get("REID_ORACLES", default))
    if not folder.is_dir():
        pytest.skip(f"no oracle files: {folder} does not exist (set REID_ORACLES)")
    return folder
