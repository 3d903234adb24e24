"""CUHK03 in its new protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from reid.data.datasets.base import MarketLike, Split, SplitCounts
from reid.registry import DATASET


@DATASET.register()
class CUHK03NP(MarketLike):
    """CUHK03-NP: the split of Zhong et al., *Re-ranking Person Re-identification* (CVPR 2017).

    Images: Li et al., *DeepReID* (CVPR 2014). 767 identities for training, 700 others for tests,
    each seen by two cameras and asked for once from each. Boxes drawn by hand: 7,368 images for
    training, 1,400 queries, 5,328 in the gallery; boxes of a detector: 7,365, 1,400, 5,332. The
    counts are those of the protocol's official page.

    Args:
        boxes: Boxes drawn by hand (`labelled`, in the folder labeled/) or found by a detector.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    _PARENTS = ("cuhk03-np", "CUHK03-NP", "cuhk03_np", "cuhk03/cuhk03-np", "cuhk03")

    def __init__(self, boxes: Literal["labelled", "detected"] = "detected", root: str = "") -> None:
        super().__init__(root)
        if boxes not in ("labelled", "detected"):
            raise ValueError(f"boxes: expected labelled or detected, got {boxes!r}")
        self.name = f"CUHK03-NP-{boxes}"
        self._boxes = boxes
        folders = ("labeled", "labelled") if boxes == "labelled" else ("detected",)
        self.candidates = [f"{parent}/{name}" for name in folders for parent in self._PARENTS]
        self.layout = (
            f"cuhk03-np/{folders[0]}/ with bounding_box_train/, query/, bounding_box_test/ with "
            "0001_c1_1.png"
        )

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of the protocol's official page."""
        train, gallery = (7368, 5328) if self._boxes == "labelled" else (7365, 5332)
        return {
            "train": SplitCounts(767, train, 2),
            "query": SplitCounts(700, 1400, 2),
            "gallery": SplitCounts(700, gallery, 2),
        }
