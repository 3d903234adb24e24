"""Anybody's images, in a folder for each camera."""

from __future__ import annotations

import logging
from pathlib import Path

from reid.data.datasets.base import (
    ReIDDataset,
    Split,
    check_cameras,
    list_numbers,
    not_empty,
)
from reid.data.scan import natural_key, scan_images
from reid.registry import DATASET
from reid.structures import UNKNOWN_CAMERA, DataError, ImageRecord

logger = logging.getLogger(__name__)

_SHOWN = 5
_LAYOUT = "a folder for each camera, with images anywhere below: entrance/monday/0001.jpg"


@DATASET.register()
class Folder(ReIDDataset):
    """A folder with one folder for each camera, and images anywhere below these; no identities.

    Cameras are numbered from 0 in the order of their folders' names, `cam2` before `cam10`. A
    folder with images and no other folder is a dataset of unknown cameras. Links are followed;
    hidden files and files that are not images are passed over, counted by kind. For training only,
    since a test needs identities. `ImageRecord.extra` has the camera's name as `camera`.

    Args:
        path: The folder, below the root.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    def __init__(self, path: str, root: str = "") -> None:
        super().__init__(root)
        self._path = path
        self.name = Path(path).name or "Folder"

    @property
    def site(self) -> str:
        """The folder."""
        return str((self.root / self._path).resolve())

    @property
    def scanned_folder(self) -> Path:
        """The folder."""
        return Path(self.site)

    def load(self, split: Split) -> list[ImageRecord]:
        """The training images, in the order of their paths.

        Raises:
            DataError: A test split was asked for, the folder is missing or has no image, images
                lie beside the cameras' folders, a folder cannot be read, or all pictures of a
                camera are of kinds that are not read.
        """
        if split != "train":
            raise DataError(
                f"{self.name}: a Folder dataset has no identities, so there is no {split}; for a "
                "test use Pattern, which reads identities from paths, or CSV"
            )
        folder = self.find_folder((self._path,), _LAYOUT)
        scan = scan_images(folder)
        names = {path.partition("/")[0] for path in scan.images if "/" in path}
        outside = [path for path in scan.images if "/" not in path]
        if names and outside:
            raise DataError(
                f"{folder}: {len(outside):,} images lie beside the cameras' folders, the first is "
                f"{outside[0]!r}; expected {_LAYOUT}"
            )
        check_cameras(scan, names, _camera, folder)
        self.cameras = tuple(sorted(names, key=natural_key))
        numbers = {name: number for number, name in enumerate(self.cameras)}
        extra = {name: {"camera": name} for name in self.cameras}
        records = []
        for path in scan.images:
            name = path.partition("/")[0]
            camid = numbers.get(name, UNKNOWN_CAMERA)
            records.append(ImageRecord(f"{folder}/{path}", camid=camid, extra=extra.get(name, {})))
        not_empty(records, folder, _LAYOUT, scan)
        if scan.passed_over():
            logger.warning("%s: passed over %s", folder, scan.passed_over())
        without = sorted({*scan.folders} - names - {*scan.repeated}, key=natural_key)
        if without:
            logger.warning(
                "%s: folders without an image, which are no cameras: %s",
                folder,
                ", ".join(map(repr, without[:_SHOWN])) + (", ..." if without[_SHOWN:] else ""),
            )
        logger.info(
            "%s: cameras %s",
            self.name,
            list_numbers(enumerate(self.cameras)) or "unknown",
        )
        return records

    def has_test(self) -> bool:
        """False: there are no identities."""
        return False


def _camera(path: str) -> str | None:
    """The camera's folder; None: the picture lies outside the cameras' folders."""
    name, separator, _ = path.partition("/")
    return name if separator else None
