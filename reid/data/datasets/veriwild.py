"""VERI-Wild."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
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

TestSize = Literal[3000, 5000, 10000]
_LAYOUT = (
    "VERI-Wild/ with images/00001/000001.jpg and train_test_split/ with train_list.txt, "
    "vehicle_info.txt, and test_3000.txt, test_3000_query.txt (or test_3000_id.txt, "
    "test_3000_id_query.txt), the same for 5000 and 10000"
)


@DATASET.register()
class VeRiWild(ReIDDataset):
    """VERI-Wild: Lou et al. (CVPR 2019).

    *VERI-Wild: A Large Dataset and a New Method for Vehicle Re-Identification in the Wild*.

    Vehicles seen by 174 cameras: 30,671 with 277,797 images for training; tests of 3,000, 5,000
    and 10,000 others, with one query each. The official page asks to remove what the query's own
    camera has seen of the vehicle, as for persons. The counts are the paper's, as fast-reid states
    them; the sizes of the galleries and the numbers of cameras could not be confirmed, so these are
    None.

    An image is listed as `VEHICLE/IMAGE`, with or without `.jpg`; the folder is the identity. The
    camera is the third field of the line, or else the second one of vehicle_info.txt; its number
    is not shifted, since nobody documents whether cameras start at 0 or 1.

    Args:
        test_size: Vehicles of the test.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.

    Raises:
        ValueError: There is no test of this size.
    """

    def __init__(self, test_size: TestSize = 3000, root: str = "") -> None:
        super().__init__(root)
        if test_size not in get_args(TestSize):
            raise ValueError(f"test_size: expected 3000, 5000 or 10000, got {test_size}")
        self.name = f"VeRi-Wild-{test_size}"
        self._test_size: TestSize = test_size
        self._cameras: dict[str, int] = {}

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of the list."""
        folder = self.find_folder(
            ("VERI-Wild", "veriwild/VERI-Wild", "VeRI-Wild", "VeRi-Wild", "VeRi_Wild", "veri-wild",
             "veriwild"),
            _LAYOUT,
        )  # fmt: skip
        lists = folder / "train_test_split"
        if split == "train":
            names = ["train_list.txt", "train_list_start0.txt"]
        else:
            end = "_query.txt" if split == "query" else ".txt"
            names = [f"test_{self._test_size}{form}{end}" for form in ("", "_id")]
        path = next((lists / name for name in names if (lists / name).is_file()), lists / names[0])
        records = []
        for where, line in read_lines(path, _LAYOUT):
            image, *rest = line.split()
            vehicle, name = PurePosixPath(image).parent.name, PurePosixPath(image).stem
            if not (vehicle.isascii() and vehicle.isdigit()) or len(rest) not in (0, 1, 2):
                raise DataError(f"{where}: {line!r} does not parse; expected e.g. 00001/000001")
            camera = (
                _number(rest[1], where)
                if len(rest) == 2
                else self._camera(lists, f"{vehicle}/{name}", where)
            )
            listed = image if PurePosixPath(image).suffix else f"{image}.jpg"
            records.append(
                ImageRecord(str(join_below(folder / "images", listed, where)), int(vehicle), camera)
            )
        check_files(records, path)
        return not_empty(records, path, _LAYOUT)

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of the paper, as fast-reid states them."""
        size = self._test_size
        return {
            "train": SplitCounts(30671, 277797),
            "query": SplitCounts(size, size),
            "gallery": SplitCounts(size),
        }

    def _camera(self, lists: Path, image: str, where: str) -> int:
        """The camera that vehicle_info.txt states, read on first use."""
        if not self._cameras:
            # The first line is the header, id/image;Camera ID;Time;Model;Type;Color.
            for place, line in list(read_lines(lists / "vehicle_info.txt", _LAYOUT))[1:]:
                listed, _, rest = line.partition(";")
                camera = _number(rest.partition(";")[0], place)
                self._cameras[listed.removesuffix(".jpg")] = camera
        if image not in self._cameras:
            raise DataError(f"{where}: {image} is not in {lists / 'vehicle_info.txt'}")
        return self._cameras[image]


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise DataError(f"{where}: camera {text!r}; expected a whole number")
    return int(text)
