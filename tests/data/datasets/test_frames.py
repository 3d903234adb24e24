"""Frames in the names of images, and in a column of a list."""

from __future__ import annotations

from pathlib import Path

import pytest

from reid.data.datasets import CSV, MSMT17, DukeMTMCreID, Market1501, OccludedDuke, VeRi776
from reid.data.datasets.frames import duke_frame, market_frame, msmt_frame, veri_frame
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.structures import DataError


@pytest.mark.parametrize(
    ("name", "camera", "sequence"),
    [
        ("0002_c1s1_000451_03.jpg", 451, 451),
        ("-1_c2s2_112233_01.jpg", 163691 + 112233, 12233),
        ("0002_c1s3_000451_03.jpg", 72681 + 74546 + 451, 451),
        ("0001_c6s4_000000_00.jpg", 87551 + 131268 + 95817, 0),
        ("0001_c9s1_000007_00.jpg", 7, 7),  # a camera that Market-1501 has not
        ("0001_c9s2_000007_00.jpg", -1, 7),  # the length of its first sequence is not known
        ("0001_c1s9_000007_00.jpg", -1, 7),
        ("0001_c1s0_000007_00.jpg", -1, 7),
        ("0002_c1_000451.jpg", -1, -1),
        ("0002_c1s1_00045_03.jpg", -1, -1),
    ],
)
def test_frames_of_market(name, camera, sequence):
    assert market_frame(name, "camera") == camera
    assert market_frame(name, "sequence") == sequence


def test_frames_of_other_names():
    assert duke_frame("0001_c2_f0046182.jpg") == 46182
    assert duke_frame("0001_c2s1_000451_03.jpg") == -1
    assert duke_frame(f"0001_c2_f{'9' * 30}.jpg") == -1
    assert msmt_frame("0000_000_01_0303morning_0015_0.jpg") == 15
    assert msmt_frame("0000_c1_0000.jpg") == -1
    assert veri_frame("0001_c001_00016450_0.jpg") == 16450
    assert veri_frame("0001_c001.jpg") == -1


def test_records_have_frames(plant):
    plant("market1501/bounding_box_train", ["0002_c1s2_000451_03.jpg"])
    assert [r.frame for r in Market1501().load("train")] == [72681 + 451]
    assert [r.frame for r in Market1501(clock="sequence").load("train")] == [451]
    plant("DukeMTMC-reID/bounding_box_train", ["0001_c2_f0046182.jpg"])
    plant("Occluded_Duke/bounding_box_train", ["0001_c2_f0046183.jpg"])
    assert [r.frame for r in DukeMTMCreID(accept_withdrawn=True).load("train")] == [46182]
    assert [r.frame for r in OccludedDuke(accept_withdrawn=True).load("train")] == [46183]
    plant("VeRi/image_train", ["0001_c001_00016450_0.jpg"])
    assert [r.frame for r in VeRi776().load("train")] == [16450]
    msmt = plant("MSMT17_V1/train", ["0000/0000_000_01_0303morning_0015_0.jpg"]).parent
    for name in ("list_train.txt", "list_val.txt"):
        (msmt / name).write_text("0000/0000_000_01_0303morning_0015_0.jpg 0\n")
    assert {r.frame for r in MSMT17().load("train")} == {15}


def test_drawn_persons_have_frames(tmp_path: Path):
    persons = SyntheticPersons(
        num_train=2, num_test=1, num_cameras=2, num_distractors=1, height=16, width=8,
        root=str(tmp_path),
    )  # fmt: skip
    assert {r.frame for r in persons.load("train")} >= {1, 2}


def test_a_column_of_a_list(tmp_path: Path, plant):
    plant(".", ["a.png", "b.png", "c.png", "d.png"])
    (tmp_path / "list.csv").write_text("path,frame,note\na.png,7,x\nb.png,,\nc.png,-1,\nd.png,8.0,")
    records = CSV("list.csv", root=str(tmp_path)).load("train")
    assert [r.frame for r in records] == [7, -1, -1, 8]
    assert records[0].extra == {"note": "x"}
    (tmp_path / "list.csv").write_text("path,frame\na.png,12:30\n")
    with pytest.raises(DataError, match=r"line 2: frame is '12:30'; expected a whole number"):
        CSV("list.csv", root=str(tmp_path)).load("train")
