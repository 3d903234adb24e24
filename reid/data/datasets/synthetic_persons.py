"""Synthetic persons, drawn on first use."""

from __future__ import annotations

import logging
from typing import Annotated

from reid import distributed
from reid.data.datasets.base import MARKET_FOLDERS, ReIDDataset, Split, scan_market_folder
from reid.data.datasets.frames import market_frame, with_frames
from reid.data.datasets.market1501 import MARKET_LAYOUT
from reid.data.synthetic import PersonSet, draw_persons
from reid.data.synthetic.cameras import Weather
from reid.registry import DATASET, Range
from reid.structures import ImageRecord

logger = logging.getLogger(__name__)


@DATASET.register()
class SyntheticPersons(ReIDDataset):
    """Drawn pedestrians in the layout of Market-1501; see `reid.data.synthetic`.

    Drawn once, below `synthetic_persons/` in the root, under a name that holds the options; the
    same options give the same files.

    Args:
        seed: Each seed gives other persons and other cameras.
        num_train: Identities for training.
        num_test: Identities for query and gallery.
        num_cameras: Cameras; each identity is seen by two or more of them.
        images_per_camera: Mean number of images of an identity in one of its cameras.
        num_distractors: Gallery images of nobody in particular.
        height: Pixels.
        width: Pixels.
        weather: `fair`, `fog` or `dusk`: sets of different weather are different domains.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.

    Raises:
        ValueError: A number is out of its range.
    """

    name = "SyntheticPersons"

    def __init__(
        self,
        seed: int = 0,
        num_train: int = 100,
        num_test: int = 60,
        num_cameras: Annotated[int, Range(1, 1000)] = 6,
        images_per_camera: Annotated[int, Range(1, 1000)] = 3,
        num_distractors: Annotated[int, Range(0, 1_000_000)] = 100,
        height: Annotated[int, Range(1, 4096)] = 128,
        width: Annotated[int, Range(1, 4096)] = 64,
        weather: Weather = "fair",
        root: str = "",
    ) -> None:
        super().__init__(root)
        self._persons = PersonSet(
            seed=seed,
            num_train=num_train,
            num_test=num_test,
            num_cameras=num_cameras,
            images_per_camera=images_per_camera,
            num_distractors=num_distractors,
            height=height,
            width=width,
            weather=weather,
        )
        self.folder = self.root / "synthetic_persons" / (
            f"seed{seed}_train{num_train}_test{num_test}_cameras{num_cameras}"
            f"_images{images_per_camera}_distractors{num_distractors}_{height}x{width}"
            f"{'' if weather == 'fair' else f'_{weather}'}"
        )  # fmt: skip

    @property
    def site(self) -> str:
        """A name made of all options."""
        return self.folder.name

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, drawn first if they are not there yet."""
        if distributed.is_main() and not self.folder.exists():
            logger.info("Drawing persons into %s", self.folder)
            draw_persons(self.folder, self._persons)
        distributed.barrier()
        records = scan_market_folder(self.folder / MARKET_FOLDERS[split], MARKET_LAYOUT)
        return with_frames(records, lambda name: market_frame(name, "sequence"))
