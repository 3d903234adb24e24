"""CUHK-SYSU as a re-identification set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from reid.data.datasets.base import ReIDDataset, Split, SplitCounts, image_names
from reid.registry import DATASET
from reid.structures import DataError, ImageRecord

_LAYOUT = (
    "cuhksysu4reid/ with train/, query/, gallery/ with 00001_s1234_0000001_0.jpg; or, for training "
    "alone, cuhk_sysu/cropped_images/ with p11422_s16929_1.jpg"
)
_SPLIT = "cuhksysu4reid"
_CROPPED = "cropped_images"
_NAME = re.compile(r"p?(\d+)_s\d+_")


@DATASET.register()
class CUHKSYSU(ReIDDataset):
    """Xiao et al., *Joint Detection and Identification Feature Learning* (CVPR 2017), cropped.

    A person search set: 5,532 persons for training and 2,900 others for tests, each with one
    query. It circulates as a re-identification set in two forms; the first one on disk is
    used. cuhksysu4reid/ is the persons' boxes cut out along the set's own split; the gallery is
    all boxes of the persons asked for in the scenes of the protocol with 50 scenes a query, for
    all queries together. cropped_images/ has no split: all of it is for training.

    Pictures are single shots and film frames, so there are no cameras: none is known here (-1),
    and the ranking removes nothing. The query's own picture is not in the gallery, since the
    protocol leaves its scene out.

    The persons are the paper's counts. Nobody publishes how many cropped images the split has in
    training and gallery, so these stay open; those of cropped_images/ are stated by Torchreid.

    Args:
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    name = "CUHK-SYSU"
    _PARENTS = ("cuhk_sysu", "cuhksysu", "CUHK-SYSU", "cuhk-sysu", "cuhk-sysu/CUHK-SYSU")
    _candidates = (
        _SPLIT,
        *(f"{parent}/{_SPLIT}" for parent in _PARENTS),
        *(f"{parent}/{_CROPPED}" for parent in _PARENTS),
    )

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of their names."""
        folder = self._find()
        if self.version == _SPLIT:
            folder = folder / split
        elif split != "train":
            raise DataError(f"{folder}: has no {split}; expected layout: {_LAYOUT}")
        return [_read_name(f"{folder}/{name}") for name in image_names(folder, _LAYOUT)]

    def has_test(self) -> bool:
        """Whether the form with a split is there."""
        self._find()
        return self.version == _SPLIT

    def published(self) -> Mapping[Split, SplitCounts]:
        """The persons of the paper's split, or the counts of the form without a split."""
        if self.version == _CROPPED:
            return {"train": SplitCounts(11934, 34574, 0)}
        return {
            "train": SplitCounts(5532, None, 0),
            "query": SplitCounts(2900, 2900, 0),
            "gallery": SplitCounts(2900, None, 0),
        }

    def _find(self) -> Path:
        folder = self.find_folder(self._candidates, _LAYOUT)
        self.version = folder.name
        return folder


def _read_name(path: str) -> ImageRecord:
    match = _NAME.match(path.rpartition("/")[2])
    if match is None:
        raise DataError(f"{path}: the name does not tell the person; expected layout: {_LAYOUT}")
    return ImageRecord(path, int(match[1]))
