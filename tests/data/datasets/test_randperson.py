from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reid.data.datasets import RandPerson
from reid.structures import DataError


@pytest.mark.parametrize(
    "folder", ["randperson_subset", "randperson_subset/randperson_subset", "RandPerson"]
)
def test_cameras_are_counted_through_the_scenes(plant: Callable[..., Path], folder: str) -> None:
    plant(
        folder,
        ["000000_s00_c00_f000264.jpg", "000000_s00_c01_f001032.jpg", "000005_s01_c00_f000001.jpg",
         "000005_s06_c01_f000001.jpg", "007999_s10_c03_f000001.jpg", "Thumbs.db"],
    )  # fmt: skip
    dataset = RandPerson()
    # Cameras before scene 1: 2; before 6: 2 + 2 + 2 + 2 + 1 + 1 = 10; before 10: 15.
    assert [(r.pid, r.camid) for r in dataset.load("train")] == [
        (0, 0), (0, 1), (5, 2), (5, 11), (7999, 18),
    ]  # fmt: skip
    assert not dataset.has_test()
    with pytest.raises(DataError, match="for training alone, it has no query"):
        dataset.load("query")


def test_names_as_first_published(plant: Callable[..., Path]) -> None:
    plant("randperson_subset", ["000003_c01_s02_f000264.jpg"])
    assert [(r.pid, r.camid) for r in RandPerson().load("train")] == [(3, 5)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("000003_f000264.jpg", "the name does not parse"),
        ("000003_s04_c01_f000264.jpg", "scene 4 with camera 1"),
        ("000003_s11_c00_f000264.jpg", "scene 11 with camera 0"),
    ],
)
def test_a_name_that_is_wrong(plant: Callable[..., Path], name: str, message: str) -> None:
    plant("randperson_subset", [name])
    with pytest.raises(DataError, match=message):
        RandPerson().load("train")
