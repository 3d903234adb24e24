"""Market-1501."""

from __future__ import annotations

from reid.data.datasets.base import MARKET_FOLDERS, ReIDDataset, Split, scan_market_folder
from reid.registry import DATASET
from reid.structures import ImageRecord

MARKET_LAYOUT = "bounding_box_train/, query/, bounding_box_test/ with 0002_c1s1_000451_03.jpg"


@DATASET.register()
class Market1501(ReIDDataset):
    """Zheng et al., *Scalable Person Re-identification: A Benchmark* (ICCV 2015).

    751 identities with 12,936 images for training; 3,368 queries of 750 identities and a gallery
    of 19,732 images from 6 cameras, 2,793 of them distractors (plus junk, identity -1).

    Args:
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    name = "Market1501"

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of their names."""
        layout = f"Market-1501-v15.09.15/ with {MARKET_LAYOUT}"
        folder = self.find_folder(
            ("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "Market-1501",
             "market1501", "Market1501"),
            layout,
        )  # fmt: skip
        return scan_market_folder(folder / MARKET_FOLDERS[split], layout)
