from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reid.data.datasets import PersonX, SplitCounts
from reid.structures import DataError


@pytest.mark.parametrize("folder", ["PersonX", "personx/PersonX", "personx"])
def test_six_cameras_are_counted_through(plant: Callable[..., Path], folder: str) -> None:
    names = [f"0001_c{number}s1_{number}.jpg" for number in (3, 4, 8, 10, 11, 12)]
    plant(f"{folder}/bounding_box_train", [*names, "0003_c8s1_2.jpg"])
    plant(f"{folder}/query", ["0002_c12s1_1.jpg"])
    plant(f"{folder}/bounding_box_test", ["0002_c3s1_9.jpg"])
    dataset = PersonX()
    train = dataset.load("train")
    assert sorted((r.pid, r.camid) for r in train) == [*((1, i) for i in range(6)), (3, 2)]
    assert SplitCounts.of(train) == SplitCounts(identities=2, images=7, cameras=6)
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(2, 5)]
    assert [(r.pid, r.camid) for r in dataset.load("gallery")] == [(2, 0)]


def test_another_subset_is_refused(plant: Callable[..., Path]) -> None:
    plant("PersonX/query", ["0001_c1s1_1.jpg"])
    with pytest.raises(DataError, match=r"0001_c1s1_1\.jpg: camera 1; the cameras .* are 3, 4, 8"):
        PersonX().load("query")
