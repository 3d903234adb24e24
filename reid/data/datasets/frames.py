"""Frame numbers in the names of images: the time of each image inside its camera."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import PurePath
from typing import Literal

from reid.structures import UNKNOWN_FRAME, ImageRecord

Clock = Literal["camera", "sequence"]
"""What Market-1501's frames count from: the start of the camera's recordings, or of a sequence."""

_MARKET = re.compile(r"(?:-1|\d+)_c(\d+)s(\d+)_(\d{6})_")
_DUKE = re.compile(r"(?:-1|\d+)_c\d+_f(\d+)")
_MSMT = re.compile(r"\d+_\d+_\d+_[^_]+_(\d+)_")
_VERI = re.compile(r"\d+_c\d+_(\d+)_\d+\.")
_DIGITS = 18  # of a 64-bit number
# Frames of each camera's sequences, in order: the largest number seen in each (st-ReID's code).
_MARKET_LENGTHS = {
    1: (72681, 74546, 74881, 74661, 74891, 54346),
    2: (163691, 164677, 98102),
    3: (161708, 161769, 104469),
    4: (72107, 72373, 74810, 74541, 74910, 50616),
    5: (161095, 161724, 103487),
    6: (87551, 131268, 95817, 30952),
}


def with_frames(
    records: Iterable[ImageRecord], frame_of: Callable[[str], int]
) -> list[ImageRecord]:
    """The records with the frames that `frame_of` reads in the names of their files."""
    return [replace(record, frame=frame_of(PurePath(record.path).name)) for record in records]


def market_frame(name: str, clock: Clock) -> int:
    """The frame of `0002_c1s1_000451_03.jpg`; -1 if the name has none.

    Args:
        name: The file's name.
        clock: Numbers restart in each sequence of a camera. `camera`: the number plus the lengths
            of the camera's earlier sequences, as st-ReID counts. `sequence`: the number without the
            first of its six digits, as MGH counts; all sequences then share one clock.
    """
    match = _MARKET.match(name)
    if match is None:
        return UNKNOWN_FRAME
    camera, sequence, number = (int(group) for group in match.groups())
    if clock == "sequence":
        return number % 100_000
    earlier = _MARKET_LENGTHS.get(camera, ())[: max(sequence - 1, 0)]
    return number + sum(earlier) if len(earlier) == sequence - 1 else UNKNOWN_FRAME


def duke_frame(name: str) -> int:
    """The frame of `0001_c2_f0046182.jpg`, which counts in its camera; -1 if the name has none."""
    return _number(_DUKE.match(name))


def msmt_frame(name: str) -> int:
    """The frame of `0000_000_01_0303morning_0015_0.jpg`, 15; -1 if the name has none.

    It counts inside a clip. The time of day stands in the name too, but not the time of a clip in
    it, so frames of different clips cannot be compared, though MGH does it.
    """
    return _number(_MSMT.match(name))


def veri_frame(name: str) -> int:
    """The frame of `0001_c001_00016450_0.jpg`, counted in its camera; -1 if the name has none."""
    return _number(_VERI.match(name))


def _number(match: re.Match[str] | None) -> int:
    return UNKNOWN_FRAME if match is None or len(match[1]) > _DIGITS else int(match[1])
