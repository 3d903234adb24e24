"""Cameras are matched by data set and name, in tests and when training goes on with other data."""

from __future__ import annotations

import logging

import pytest
import torch

from reid.assembly.cameras import Camera, carry_cameras, dump_cameras, match_camera, read_cameras
from reid.modeling.weights import WeightsError

OLD = [Camera("own", 0, "hall"), Camera("own", 1, "yard"), Camera("Market1501", 0),
       Camera("Market1501", 1, "", False)]  # fmt: skip


def test_cameras_match_by_name_or_else_by_number() -> None:
    assert match_camera(OLD, "own", 5, "yard") == 1
    assert match_camera(OLD, "own", 1, "hall") == 0
    assert match_camera(OLD, "own", 1, "") == 1
    assert match_camera(OLD, "own", 0, "door") is None
    assert match_camera(OLD, "Market1501", 0, "") == 2
    assert match_camera(OLD, "elsewhere", 0, "hall") is None
    assert match_camera(OLD, "Market1501", 1, "") is None  # no training image showed it
    assert match_camera([OLD[2], OLD[2]], "Market1501", 0, "") is None  # which of the two?


def test_other_cameras_start_from_the_mean_and_known_ones_keep_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = torch.tensor([[[1.0]], [[3.0]], [[8.0]], [[0.0]]])
    new = [Camera("own", 0, "yard"), Camera("own", 1, "door"), Camera("own", 2, "roof", False)]
    with caplog.at_level(logging.INFO):
        carried = carry_cameras(table, OLD, new, "w.safetensors")
    assert carried.flatten().tolist() == [3, 4, 0]
    assert caplog.messages == [
        "Cameras: w.safetensors knows 1 of 3 by data set and name; the others start from "
        "the mean of its 3"
    ]


def test_cameras_of_another_site_take_over_nothing() -> None:
    table = torch.tensor([[[1.0]], [[3.0]]])
    there = [Camera("there", 0), Camera("there", 1)]
    assert carry_cameras(table, OLD[:2], there, "w").flatten().tolist() == [2, 2]
    assert carry_cameras(table, None, there, "w").flatten().tolist() == [2, 2]


def test_the_cameras_in_a_weights_file_are_checked() -> None:
    assert read_cameras({"cameras": dump_cameras(OLD)}, "w") == OLD
    assert read_cameras({}, "w") is None
    wrong = ("[", "{}x", "[[1, 2]]", '[["a", "0", "", true]]', '[["a", 0, "", 1]]', "[" * 10**5)
    for text in wrong:
        with pytest.raises(WeightsError, match="w: expected a list of"):
            read_cameras({"cameras": text}, "w")
