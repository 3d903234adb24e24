"""MSMT17."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from reid.data.datasets.base import (
    MARKET_FOLDERS,
    ReIDDataset,
    Split,
    SplitCounts,
    check_files,
    join_below,
    not_empty,
    read_lines,
    scan_market_folder,
)
from reid.data.datasets.frames import msmt_frame
from reid.registry import DATASET
from reid.structures import DataError, ImageRecord

_LISTS: Mapping[Split, Sequence[str]] = {
    "train": ("list_train.txt", "list_val.txt"),
    "query": ("list_query.txt",),
    "gallery": ("list_gallery.txt",),
}
_LAYOUT = (
    "MSMT17_V1/ with train/, test/, list_train.txt, list_val.txt, list_query.txt, "
    "list_gallery.txt; or MSMT17_V2/ with mask_train_v2/, mask_test_v2/ and the same lists; or "
    "MSMT17/ with bounding_box_train/, query/, bounding_box_test/ with 0000_c1_0000.jpg"
)
_NAME = re.compile(r"\d+_\d+_(\d+)_")


@DATASET.register()
class MSMT17(ReIDDataset):
    """Wei et al., *Person Transfer GAN to Bridge Domain Gap* (CVPR 2018).

    Training takes list_train.txt and list_val.txt together, as most published results do: 1,041
    identities with 32,621 images; 11,659 queries of 3,060 other identities and a gallery of
    82,161 images from 15 cameras. V2 has the images of V1 with masked faces. The counts are the
    paper's. The lists number identities from 0 in training and again in the test.

    Args:
        version: `V1` or `V2`; empty: whichever is there, V1 if both are.
        with_val: Train on list_val.txt too; false: only on the 30,248 images of list_train.txt,
            as fast-reid does.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    name = "MSMT17"
    same_numbers = False

    def __init__(
        self, version: Literal["", "V1", "V2"] = "", with_val: bool = True, root: str = ""
    ) -> None:
        super().__init__(root)
        self._wanted = version
        self._with_val = with_val

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts of the paper; both versions have them."""
        return {
            "train": SplitCounts(1041, 32621 if self._with_val else 30248, 15),
            "query": SplitCounts(3060, 11659, 15),
            "gallery": SplitCounts(3060, 82161, 15),
        }

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of the lists, or of the names where there is none."""
        versions = [f"MSMT17_{name}" for name in ("V1", "V2") if self._wanted in ("", name)]
        nested = [f"{parent}/{name}" for parent in ("msmt17", "MSMT17") for name in versions]
        folder = self.find_folder((*versions, *nested, "MSMT17", "msmt17"), _LAYOUT)
        if (folder / MARKET_FOLDERS[split]).is_dir():
            if split == "train" and not self._with_val:
                raise DataError(
                    f"{folder}: with_val: false needs the lists, which tell train and val apart; "
                    f"this is Market-1501's layout, which has them in one folder ({_LAYOUT})"
                )
            self.version = f"{folder.name}, in Market-1501's layout"
            return scan_market_folder(folder / MARKET_FOLDERS[split], _LAYOUT)
        part = "train" if split == "train" else "test"
        images = next(
            (folder / name for name in (part, f"mask_{part}_v2") if (folder / name).is_dir()), None
        )
        if images is None:
            raise DataError(
                f"{folder}: there is no {part}/, mask_{part}_v2/ or {MARKET_FOLDERS[split]}/; "
                f"expected layout: {_LAYOUT}"
            )
        self.version = "MSMT17_V1" if images.name == part else "MSMT17_V2"
        if not self.version.endswith(self._wanted):
            raise DataError(
                f"{images}: holds {self.version}, but datasets asks for version {self._wanted}"
            )
        lists = _LISTS[split][:1] if not self._with_val else _LISTS[split]
        records = [record for name in lists for record in _read_list(folder / name, images)]
        return not_empty(records, folder / _LISTS[split][0], _LAYOUT)


def _read_list(path: Path, images: Path) -> list[ImageRecord]:
    """Records of lines such as `0000/0000_000_01_0303morning_0015_0.jpg 0`."""
    records = []
    for where, line in read_lines(path, _LAYOUT):
        name, _, pid = line.rpartition(" ")
        file = PurePosixPath(name).name
        camera = _NAME.match(file)
        if camera is None or int(camera[1]) < 1 or not (pid.isascii() and pid.isdigit()):
            raise DataError(
                f"{where}: {line!r} does not parse; expected a path and an identity, e.g. "
                "0000/0000_000_01_0303morning_0015_0.jpg 0"
            )
        image = join_below(images, name, where)
        records.append(
            ImageRecord(str(image), int(pid), int(camera[1]) - 1, frame=msmt_frame(file))
        )
    check_files(records, path)
    return records
