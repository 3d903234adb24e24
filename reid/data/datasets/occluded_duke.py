"""Occluded-Duke."""

from __future__ import annotations

from collections.abc import Mapping

from reid.data.datasets.base import MarketLike, Split, SplitCounts
from reid.data.datasets.dukemtmc import check_accepted
from reid.data.datasets.frames import duke_frame, with_frames
from reid.registry import DATASET
from reid.structures import ImageRecord


@DATASET.register()
class OccludedDuke(MarketLike):
    """Miao et al., *Pose-Guided Feature Alignment for Occluded Person Re-ID* (ICCV 2019).

    DukeMTMC-reID split anew, so that every query is occluded: 702 identities with 15,618 images
    for training; 2,210 queries of 519 identities and a gallery of 17,661 images of 1,110
    identities, 8 cameras. The counts are the paper's.

    Its images are those of the withdrawn DukeMTMC recordings; see `DukeMTMCreID`. Its authors
    publish lists of names only, and a script that makes the folders from DukeMTMC-reID.

    Args:
        accept_withdrawn: The user knows this, and has a reason to use it nevertheless.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.

    Raises:
        ValueError: `accept_withdrawn` is not set.
    """

    name = "Occluded-Duke"
    layout = (
        "Occluded_Duke/ with bounding_box_train/, query/, bounding_box_test/ with "
        "0001_c2_f0046182.jpg"
    )
    candidates = ("Occluded_Duke", "occluded_duke/Occluded_Duke", "dukemtmcreid/Occluded_Duke",
                  "Occluded-DukeMTMC-Dataset/Occluded_Duke", "Occluded-Duke",
                  "occluded_duke")  # fmt: skip

    def __init__(self, accept_withdrawn: bool = False, root: str = "") -> None:
        check_accepted("Occluded-Duke", accept_withdrawn)
        super().__init__(root)

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of their names, with their frames."""
        return with_frames(super().load(split), duke_frame)

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of the paper."""
        return {
            "train": SplitCounts(702, 15618, 8),
            "query": SplitCounts(519, 2210, 8),
            "gallery": SplitCounts(1110, 17661, 8),
        }
