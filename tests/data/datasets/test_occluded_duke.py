from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reid.data.datasets import OccludedDuke, SplitCounts


@pytest.mark.parametrize("folder", ["Occluded_Duke", "dukemtmcreid/Occluded_Duke"])
def test_splits(plant: Callable[..., Path], folder: str) -> None:
    plant(f"{folder}/bounding_box_train", ["0001_c2_f0046182.jpg", "0009_c1_f0061182.jpg"])
    plant(f"{folder}/query", ["0005_c2_f0046985.jpg"])
    plant(f"{folder}/bounding_box_test", ["0005_c5_f0052165.jpg", "train.list"])
    dataset = OccludedDuke(accept_withdrawn=True)
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(1, 1), (9, 0)]
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(5, 1)]
    assert [(r.pid, r.camid) for r in dataset.load("gallery")] == [(5, 4)]
    assert dataset.published()["query"] == SplitCounts(519, 2210, 8)


def test_needs_accept_withdrawn() -> None:
    with pytest.raises(ValueError, match=r"^Occluded-Duke shows people .* withdrawn in 2019"):
        OccludedDuke()
