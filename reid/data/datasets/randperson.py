"""RandPerson."""

from __future__ import annotations

import re
from collections.abc import Mapping

from reid.data.datasets.base import ReIDDataset, Split, SplitCounts, image_names
from reid.registry import DATASET
from reid.structures import DataError, ImageRecord

_LAYOUT = "randperson_subset/ with 000000_s00_c00_f000264.jpg"
_NAME = re.compile(r"(\d+)_(?:s(\d+)_c(\d+)|c(\d+)_s(\d+))_")
_CAMERAS_OF_SCENE = (2, 2, 2, 2, 1, 1, 2, 1, 1, 1, 4)


@DATASET.register()
class RandPerson(ReIDDataset):
    """Wang et al., *Surpassing Real-World Source Training Data* (ACM Multimedia 2020).

    Drawn persons, for training only: the subset of 132,145 images of 8,000 identities on which
    the paper trains; the counts are the paper's and its official page's. Its 11 scenes have 19
    cameras; names count them from 0 in each scene (`_s00_c00_`, or `_c00_s00_` as first published);
    here they have the numbers 0 to 18.

    Args:
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    name = "RandPerson"
    _candidates = ("randperson_subset/randperson_subset", "randperson_subset",
                   "randperson/randperson_subset", "RandPerson/randperson_subset",
                   "RandPerson/images/subset/randperson_subset/randperson_subset",
                   "randperson", "RandPerson")  # fmt: skip

    def load(self, split: Split) -> list[ImageRecord]:
        """The training images, in the order of their names."""
        if split != "train":
            raise DataError(f"{self.name}: is for training alone, it has no {split}")
        folder = self.find_folder(self._candidates, _LAYOUT)
        return [_read_name(f"{folder}/{name}") for name in image_names(folder, _LAYOUT)]

    def has_test(self) -> bool:
        """False: the set is for training only."""
        return False

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of the paper's subset."""
        return {"train": SplitCounts(8000, 132145, 19)}


def _read_name(path: str) -> ImageRecord:
    match = _NAME.match(path.rpartition("/")[2])
    if match is None:
        raise DataError(f"{path}: the name does not parse; expected layout: {_LAYOUT}")
    scene, camera = int(match[2] or match[5]), int(match[3] or match[4])
    if scene >= len(_CAMERAS_OF_SCENE) or camera >= _CAMERAS_OF_SCENE[scene]:
        raise DataError(
            f"{path}: scene {scene} with camera {camera}; the scenes 0 to 10 have "
            f"{', '.join(map(str, _CAMERAS_OF_SCENE))} cameras; expected layout: {_LAYOUT}"
        )
    return ImageRecord(path, int(match[1]), sum(_CAMERAS_OF_SCENE[:scene]) + camera)
