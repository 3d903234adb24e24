"""PKU VehicleID."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Literal, get_args

from reid.data.datasets.base import (
    ReIDDataset,
    Split,
    SplitCounts,
    check_files,
    join_below,
    not_empty,
    read_lines,
)
from reid.registry import DATASET
from reid.structures import DataError, ImageRecord

TestSize = Literal[800, 1600, 2400]
_LAYOUT = (
    "VehicleID_V1.0/ with image/0000001.jpg and train_test_split/ with train_list.txt, "
    "test_list_800.txt, test_list_1600.txt, test_list_2400.txt"
)
_TEST_IMAGES: Mapping[TestSize, int] = {800: 6493, 1600: 13377, 2400: 19777}


@DATASET.register()
class VehicleID(ReIDDataset):
    """PKU VehicleID: Liu et al., *Deep Relative Distance Learning* (CVPR 2016).

    Vehicles: 13,164 with 113,346 images for training; tests of 800, 1,600 and 2,400 others with
    6,493, 13,377 and 19,777 images. These are the counts of the lists that circulate, as fast-reid
    states them.

    The protocol: one image of each vehicle, chosen at random, is the gallery, all its other images
    are queries; published results are the mean of ten such choices. Here the chosen image is the
    one whose SHA-256 of `SEED/NAME` is the smallest of its vehicle, so the choice depends only on
    the seed and the names; set other seeds for other choices. Cameras are unknown (-1), and the
    ranking removes nothing: query and gallery share no image.

    Args:
        test_size: Vehicles of the test.
        gallery_seed: Each seed chooses another gallery.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.

    Raises:
        ValueError: There is no test of this size.
    """

    def __init__(self, test_size: TestSize = 800, gallery_seed: int = 0, root: str = "") -> None:
        super().__init__(root)
        if test_size not in get_args(TestSize):
            raise ValueError(f"test_size: expected 800, 1600 or 2400, got {test_size}")
        self.name = f"VehicleID-{test_size}"
        self._test_size: TestSize = test_size
        self._seed = gallery_seed

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of the list."""
        if split == "train":
            return self._read("train_list.txt")
        records = self._read(f"test_list_{self._test_size}.txt")
        drawn: dict[int, ImageRecord] = {}
        for record in records:
            best = drawn.setdefault(record.pid, record)
            if self._draw(record) < self._draw(best):
                drawn[record.pid] = record
        return [r for r in records if (drawn[r.pid] is r) == (split == "gallery")]

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of the lists, as fast-reid states them."""
        size = self._test_size
        return {
            "train": SplitCounts(13164, 113346, 0),
            "query": SplitCounts(size, _TEST_IMAGES[size] - size, 0),
            "gallery": SplitCounts(size, size, 0),
        }

    def _read(self, name: str) -> list[ImageRecord]:
        """Records of lines such as `0000001 42`."""
        folder = self.find_folder(
            ("VehicleID_V1.0", "vehicleid/VehicleID_V1.0", "VehicleID/VehicleID_V1.0", "VehicleID",
             "vehicleid"),
            _LAYOUT,
        )  # fmt: skip
        path = folder / "train_test_split" / name
        records = []
        for where, line in read_lines(path, _LAYOUT):
            image, _, pid = line.partition(" ")
            if not (pid.isascii() and pid.isdigit()):
                raise DataError(f"{where}: {line!r} does not parse; expected e.g. 0000001 42")
            listed = image if PurePosixPath(image).suffix else f"{image}.jpg"
            records.append(ImageRecord(str(join_below(folder / "image", listed, where)), int(pid)))
        check_files(records, path)
        return not_empty(records, path, _LAYOUT)

    def _draw(self, record: ImageRecord) -> bytes:
        stem = PurePosixPath(record.path).stem
        return hashlib.sha256(f"{self._seed}/{stem}".encode()).digest()
