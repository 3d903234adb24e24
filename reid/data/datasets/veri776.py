"""VeRi-776."""

from __future__ import annotations

from collections.abc import Mapping

from reid.data.datasets.base import MarketLike, Split, SplitCounts
from reid.data.datasets.frames import veri_frame, with_frames
from reid.registry import DATASET
from reid.structures import ImageRecord


@DATASET.register()
class VeRi776(MarketLike):
    """Liu et al., *A Deep Learning-Based Approach to Progressive Vehicle Re-ID* (ECCV 2016).

    Vehicles: 576 with 37,778 images for training; 1,678 queries of 200 others and a gallery of
    11,579 images; 20 cameras. The counts are the paper's and the dataset's readme's; how many of
    the cameras queries and gallery have is not stated. A query's own camera is removed, as for
    persons.

    Args:
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    name = "VeRi-776"
    layout = "VeRi/ with image_train/, image_query/, image_test/ with 0001_c001_00016450_0.jpg"
    candidates = ("VeRi", "veri/VeRi", "VeRi-776", "veri-776", "VeRi776", "veri776", "veri",
                  "VeRi_with_plate")  # fmt: skip
    folders: Mapping[Split, str] = {
        "train": "image_train",
        "query": "image_query",
        "gallery": "image_test",
    }

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of the paper and the dataset's readme."""
        return {
            "train": SplitCounts(576, 37778, 20),
            "query": SplitCounts(200, 1678),
            "gallery": SplitCounts(200, 11579),
        }

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of their names, with their frames."""
        return with_frames(super().load(split), veri_frame)
