from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from reid.data.datasets import CUHK03NP
from reid.registry import DATASET, ConfigError, build


@pytest.mark.parametrize("parent", ["cuhk03-np", "CUHK03-NP"])
@pytest.mark.parametrize(("boxes", "folder"), [("labelled", "labeled"), ("detected", "detected")])
def test_splits(
    plant: Callable[..., Path],
    parent: str,
    boxes: Literal["labelled", "detected"],
    folder: str,
) -> None:
    other = "detected" if boxes == "labelled" else "labeled"
    plant(f"{parent}/{other}/bounding_box_train", ["0009_c1_1.png"])
    folder = f"{parent}/{folder}"
    plant(f"{folder}/bounding_box_train", ["0003_c1_21.png", "0003_c2_26.png", "0010_c1_1.png"])
    plant(f"{folder}/query", ["0001_c1_1.png", "0001_c2_6.png", "Thumbs.db"])
    plant(f"{folder}/bounding_box_test", ["0001_c1_2.png"])
    dataset = CUHK03NP(boxes=boxes)
    assert dataset.name == f"CUHK03-NP-{boxes}"
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(3, 0), (3, 1), (10, 0)]
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(1, 0), (1, 1)]
    assert [(r.pid, r.camid) for r in dataset.load("gallery")] == [(1, 0)]


def test_published_counts_differ_by_boxes() -> None:
    images = {
        boxes: [counts.images for counts in CUHK03NP(boxes=boxes).published().values()]
        for boxes in ("labelled", "detected")
    }
    assert images == {"labelled": [7368, 1400, 5328], "detected": [7365, 1400, 5332]}


def test_boxes_are_one_of_two() -> None:
    with pytest.raises(ConfigError, match=r"boxes: expected one of 'labelled', 'detected'"):
        build(DATASET, {"name": "CUHK03NP", "boxes": "labeled"}, "datasets.train")
    with pytest.raises(ValueError, match="boxes: expected labelled or detected, got 'x'"):
        CUHK03NP(boxes="x")  # type: ignore[arg-type]
