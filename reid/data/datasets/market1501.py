"""Market-1501."""

from __future__ import annotations

import re
from collections.abc import Mapping

from reid.data.datasets.base import MarketLike, Split, SplitCounts, image_names, not_empty
from reid.data.datasets.frames import Clock, market_frame, with_frames
from reid.registry import DATASET
from reid.structures import UNKNOWN_CAMERA, DataError, ImageRecord

MARKET_LAYOUT = "bounding_box_train/, query/, bounding_box_test/ with 0002_c1s1_000451_03.jpg"
_DISTRACTOR = 0
_JUNK = re.compile(r"-1_")
_CAMERA = re.compile(r"\d+_c([1-9]\d*)(?!\d)")


@DATASET.register()
class Market1501(MarketLike):
    """Zheng et al., *Scalable Person Re-identification: A Benchmark* (ICCV 2015).

    751 identities with 12,936 images for training; 3,368 queries of 750 identities and a gallery
    of 19,732 images from 6 cameras. The gallery's 19,732 are what the paper and the readme of the
    dataset state and what lies in bounding_box_test/: 13,115 images of the 750 identities, the
    rest distractors (0000, one identity of the 751 counted) and junk (-1, which counts neither for
    nor against). Reports of 15,913 images leave out the junk.

    Args:
        distractors_500k: Adds the 500,000 distractors that the authors publish beside the dataset
            to the gallery: from `images/` in the dataset's folder, where their archive unpacks to,
            or `distractors_500k/` in it or beside it. All count as distractors (identity 0)
            whatever their names say, except that names with identity -1 are junk and left out. The
            camera is read from the name, if it has one.
        clock: What the frames count from; see `market_frame`.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    name = "Market1501"
    layout = f"Market-1501-v15.09.15/ with {MARKET_LAYOUT}"
    candidates = ("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15",
                  "Market1501/Market-1501-v15.09.15", "Market-1501", "market1501",
                  "Market1501")  # fmt: skip

    def __init__(
        self, distractors_500k: bool = False, clock: Clock = "camera", root: str = ""
    ) -> None:
        super().__init__(root)
        self._clock: Clock = clock
        self._distractors = distractors_500k
        if distractors_500k:
            self.name = "Market1501+500k"

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of their names; the 500,000 come last."""
        records = with_frames(super().load(split), lambda name: market_frame(name, self._clock))
        if self._distractors and split == "gallery":
            records += self._load_distractors()
        return records

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of the paper and the dataset's readme, with junk and distractors."""
        return {
            "train": SplitCounts(751, 12936, 6),
            "query": SplitCounts(750, 3368, 6),
            # The paper says "over 500k": no exact count of the large gallery is published.
            "gallery": SplitCounts(751, None if self._distractors else 19732, 6),
        }

    def _load_distractors(self) -> list[ImageRecord]:
        market = self.find_folder(self.candidates, self.layout)
        places = (market / "distractors_500k" / "images", market / "distractors_500k",
                  market / "images", market.parent / "distractors_500k")  # fmt: skip
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise DataError(
                f"{market}: DISTRACTORS_500K is set, but there is no images/ or distractors_500k/; "
                "unpack distractors_500k.zip there"
            )
        layout = "images of any name"
        records = []
        for name in image_names(folder, layout):
            if _JUNK.match(name):
                continue
            camera = _CAMERA.match(name)
            camid = int(camera[1]) - 1 if camera else UNKNOWN_CAMERA
            records.append(ImageRecord(f"{folder}/{name}", _DISTRACTOR, camid))
        return not_empty(records, folder, layout)
