"""PersonX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from reid.data.datasets.base import MarketLike, Split, SplitCounts
from reid.registry import DATASET
from reid.structures import DataError, ImageRecord

_CAMERAS = (3, 4, 8, 10, 11, 12)


@DATASET.register()
class PersonX(MarketLike):
    """Sun and Zheng, *Dissecting Person Re-ID from the Viewpoint of Viewpoint* (CVPR 2019).

    Drawn persons. This is the subset with complex backgrounds, on which domain adaptation is
    measured: 410 identities with 9,840 images for training; 5,136 queries of 856 other identities
    and a gallery of 30,816 images. Its six cameras have the numbers 3, 4, 8, 10, 11 and 12 in the
    names, and 0 to 5 here. The counts are those of the datasets' tables of Ge et al., *Self-paced
    Contrastive Learning* (NeurIPS 2020). The folders 1/ to 6/ of PersonX_v1, one for each
    background of the first paper, are another set and not read.

    Args:
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    name = "PersonX"
    layout = (
        "PersonX/ with bounding_box_train/, query/, bounding_box_test/ with 0001_c3s1_1.jpg, "
        "cameras 3, 4, 8, 10, 11, 12"
    )
    candidates = ("PersonX", "personx/PersonX", "personX", "personx")

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of their names."""
        return [
            replace(record, camid=self._index(record.camid + 1, record.path))
            for record in super().load(split)
        ]

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of Ge et al."""
        return {
            "train": SplitCounts(410, 9840, 6),
            "query": SplitCounts(856, 5136, 6),
            "gallery": SplitCounts(856, 30816, 6),
        }

    def _index(self, number: int, path: str) -> int:
        if number not in _CAMERAS:
            raise DataError(
                f"{path}: camera {number}; the cameras of this subset are "
                f"{', '.join(map(str, _CAMERAS))}; expected layout: {self.layout}"
            )
        return _CAMERAS.index(number)
