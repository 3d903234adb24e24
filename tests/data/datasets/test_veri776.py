from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reid.data.datasets import SplitCounts, VeRi776


@pytest.mark.parametrize("folder", ["VeRi", "veri/VeRi", "veri"])
def test_splits(plant: Callable[..., Path], folder: str) -> None:
    plant(f"{folder}/image_train", ["0001_c001_00016450_0.jpg", "0003_c020_00084280_1.jpg"])
    plant(f"{folder}/image_query", ["0002_c002_00030600_0.jpg", "Thumbs.db"])
    plant(f"{folder}/image_test", ["0002_c003_00034605_0.jpg", "0005_c010_00068915_0.jpg"])
    plant(folder, ["name_train.txt", "train_label.xml"])
    dataset = VeRi776()
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(1, 0), (3, 19)]
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(2, 1)]
    assert [(r.pid, r.camid) for r in dataset.load("gallery")] == [(2, 2), (5, 9)]
    assert dataset.published()["train"] == SplitCounts(576, 37778, 20)
