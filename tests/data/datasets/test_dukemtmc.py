from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reid.assembly.data import build_dataset
from reid.data.datasets import DukeMTMCreID
from reid.registry import ConfigError


@pytest.mark.parametrize("folder", ["DukeMTMC-reID", "dukemtmc-reid/DukeMTMC-reID", "dukemtmcreid"])
def test_splits(plant: Callable[..., Path], folder: str) -> None:
    plant(f"{folder}/bounding_box_train", ["0001_c8_f0046182.jpg", "0001_c2_f0046302.jpg"])
    plant(f"{folder}/query", ["0005_c2_f0046985.jpg"])
    plant(f"{folder}/bounding_box_test", ["0005_c5_f0052165.jpg", "7138_c8_f0151635.jpg"])
    dataset = DukeMTMCreID(accept_withdrawn=True)
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(1, 1), (1, 7)]
    assert [(r.pid, r.camid) for r in dataset.load("query")] == [(5, 1)]
    assert [(r.pid, r.camid) for r in dataset.load("gallery")] == [(5, 4), (7138, 7)]
    assert dataset.published()["gallery"].identities == 1110


def test_needs_accept_withdrawn() -> None:
    with pytest.raises(ConfigError) as caught:
        build_dataset({"name": "DukeMTMCreID"}, "datasets.train")
    message = str(caught.value)
    assert message.startswith("datasets.train (DukeMTMCreID): DukeMTMC-reID shows people who did")
    assert "withdrawn in 2019" in message
    assert "DATASETS.TRAIN.ACCEPT_WITHDRAWN true" in message
    build_dataset({"name": "DukeMTMCreID", "accept_withdrawn": True}, "datasets.train")
