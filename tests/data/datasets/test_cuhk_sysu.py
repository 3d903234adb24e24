from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reid.data.datasets import CUHKSYSU, SplitCounts
from reid.evaluation.ranking import rank
from reid.structures import DataError, FeatureSet


@pytest.mark.parametrize("folder", ["cuhksysu4reid", "cuhk_sysu/cuhksysu4reid"])
def test_the_form_with_a_split(plant: Callable[..., Path], folder: str) -> None:
    plant("cuhk_sysu/cropped_images", ["p1_s2_1.jpg"])
    plant(f"{folder}/train", ["00003_s1234_0000001_0.jpg", "05532_s7_0000002_1.jpg", "Thumbs.db"])
    plant(f"{folder}/query", ["05600_s18_0000001_0.jpg", "05601_s19_0000002_0.jpg"])
    plant(f"{folder}/gallery", ["05600_s21_0000001_0.jpg", "05601_s22_0000002_0.jpg"])
    dataset = CUHKSYSU()
    assert dataset.published()["train"].identities == 5532
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(3, -1), (5532, -1)]
    assert dataset.version == "cuhksysu4reid"
    assert dataset.has_test()
    query, gallery = dataset.load("query"), dataset.load("gallery")
    assert [r.pid for r in query] == [r.pid for r in gallery] == [5600, 5601]
    # No camera is known, so no image is removed: every query has its match.
    pids = torch.tensor([r.pid for r in query])
    camids = torch.tensor([r.camid for r in query])
    features = FeatureSet.of(torch.eye(2), pids, camids)
    result = rank(features, features).ranking
    assert np.array_equal(result.average_precision, [1.0, 1.0])


def test_the_form_without_a_split(plant: Callable[..., Path]) -> None:
    plant("CUHK-SYSU/cropped_images", ["p11422_s16929_1.jpg", "p11422_s16930_1.jpg"])
    dataset = CUHKSYSU()
    assert not dataset.has_test()
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [(11422, -1), (11422, -1)]
    assert dataset.version == "cropped_images"
    assert dataset.published() == {"train": SplitCounts(11934, 34574, 0)}
    with pytest.raises(DataError, match=r"cropped_images: has no gallery"):
        dataset.load("gallery")


def test_a_name_that_is_wrong(plant: Callable[..., Path]) -> None:
    plant("cuhksysu4reid/train", ["s1234.jpg"])
    with pytest.raises(DataError, match=r"s1234\.jpg: the name does not tell the person"):
        CUHKSYSU().load("train")
