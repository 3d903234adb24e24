"""Heatmaps of joints from files, and how such files are made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import read_array

from reid.data.images import read_image
from reid.data.maps import FloatMap, ImageMap
from reid.data.resize import Pixels
from reid.data.synthetic.person_set import JOINTS_FILE
from reid.files import InputError, read_bytes, replacing
from reid.projects.pfd.pose import HEATMAP, JOINTS, MIRRORED_JOINTS
from reid.registry import MAP, Range
from reid.structures import DataError, ImageRecord, ProgressBar

_MOST_BYTES = 2**28
_LARGEST = 2.0  # of a confidence; networks trained on heatmaps put out a little more than 1
_MADE = "projects/PFD/README.md says how they are made"
_SIGMA = 1 / 32  # of a joint's blob in heights of the map, as HRNet was trained


@MAP.register()
class PoseHeatmaps(ImageMap):
    """Heatmaps of COCO's 17 joints, one `.npy` file for each image.

    A file holds (17, h, w) numbers, of any size: a pose network's output for the whole image, whose
    peaks are confidences of about 0 to 1. It has the image's path below `root`, but below `folder`:
    the heatmaps of ROOT/market/query/a.jpg are in ROOT/heatmaps/market/query/a.jpg.npy.

    Args:
        folder: Folder of the heatmaps, in `root` unless it is a whole path.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
        stride: Pixels of the network's input for one place of the heatmaps.

    Attributes:
        side: See `ImageMap`.
        mirror: See `ImageMap`: left and right joints change places.
        stride: As above.
    """

    side = HEATMAP
    mirror = MIRRORED_JOINTS

    def __init__(
        self,
        folder: str = "heatmaps",
        root: str = "",
        stride: Annotated[int, Range(1, 1024)] = 4,
    ) -> None:
        self._root = Path(root or os.environ.get("REID_DATASETS", "datasets"))
        self._folder = self._root / folder
        self.stride = stride

    def check(self, records: Sequence[ImageRecord]) -> None:
        """Checks that each image has a file.

        Raises:
            DataError: One has none; names it.
        """
        missing = [record.path for record in records if not self.file(record.path).is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: has no heatmaps ({len(missing):,} of {len(records):,} images have "
                f"none), expected them in {self.file(missing[0])}; {_MADE}"
            )

    def file(self, path: str) -> Path:
        """The file with the heatmaps of an image.

        Raises:
            DataError: The image is not below the root.
        """
        try:
            place = Path(path).absolute().relative_to(self._root.absolute())
        except ValueError:
            raise DataError(
                f"{path}: has no heatmaps, since it is not below {self._root}; set the ROOT of "
                "PoseHeatmaps in INPUT.MAPS"
            ) from None
        return self._folder / f"{place}.npy"

    def read(self, record: ImageRecord) -> FloatMap:
        """The heatmaps (17, h, w) of an image.

        Raises:
            DataError: There are none, or they are not such numbers; names the image.
        """
        file = self.file(record.path)
        try:
            data = read_bytes(file, _MOST_BYTES, "file of heatmaps")
            values = read_array(BytesIO(data), allow_pickle=False)
        except InputError as error:
            raise DataError(f"{record.path}: has no heatmaps ({error}); {_MADE}") from error
        except (ValueError, EOFError, MemoryError) as error:
            raise DataError(
                f"{record.path}: {file} is no .npy file of numbers ({error})"
            ) from error
        return _checked(values, f"{record.path}: {file}")


def _checked(values: npt.NDArray[np.generic], where: str) -> FloatMap:
    """Heatmaps (17, h, w) in float32.

    Raises:
        DataError: They are not such numbers.
    """
    if (
        values.ndim != 3
        or len(values) != len(JOINTS)
        or not values.size
        or values.dtype.kind != "f"
    ):
        raise DataError(
            f"{where}: expected floats ({len(JOINTS)}, h, w), one map for each of COCO's joints, "
            f"got {values.dtype} {values.shape}"
        )
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise DataError(f"{where}: some of its numbers are not finite")
    if numbers.max() > _LARGEST:
        raise DataError(
            f"{where}: its largest number is {numbers.max():.4g}; expected confidences, with peaks "
            "of about 1 (divide levels by 255, take the sigmoid of logits)"
        )
    return numbers


@MAP.register()
class DrawnHeatmaps(ImageMap):
    """Heatmaps of the joints of `SyntheticPersons`, which are known since the persons were drawn.

    What stands in front of a joint lowers its peak. A body does not hide its own joints.

    Args:
        stride: Pixels of the network's input for one place of the heatmaps.

    Attributes:
        side: See `ImageMap`.
        mirror: See `ImageMap`: left and right joints change places.
        stride: As above.
    """

    side = HEATMAP
    mirror = MIRRORED_JOINTS

    def __init__(self, stride: Annotated[int, Range(1, 1024)] = 4) -> None:
        self.stride = stride

    def check(self, records: Sequence[ImageRecord]) -> None:
        """Checks that each image is of a drawn set.

        Raises:
            DataError: One is not; names it.
        """
        for record in records:
            self._joints(record)

    def read(self, record: ImageRecord) -> FloatMap:
        """The heatmaps (17, h, w) of an image, with a quarter of its sides.

        Raises:
            DataError: The image is of no drawn set.
        """
        joints, (height, width) = self._joints(record)
        scaled = joints * np.array([1 / 4, 1 / 4, 1], np.float32)
        return heatmaps_of_joints(scaled, (max(1, height // 4), max(1, width // 4)))

    def _joints(self, record: ImageRecord) -> tuple[FloatMap, tuple[int, int]]:
        path = Path(record.path)
        file = path.parent.parent / JOINTS_FILE
        try:
            places, size = _drawn_joints(file)
            return places[f"{path.parent.name}/{path.name}"], size
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{record.path}: its joints are not known, expected them in {file}; DrawnHeatmaps "
                "are for SyntheticPersons alone. A set that an earlier version has drawn has none: "
                "remove its folder, and it is drawn anew"
            ) from error


@lru_cache(maxsize=16)
def _drawn_joints(file: Path) -> tuple[dict[str, FloatMap], tuple[int, int]]:
    """Joints (17, 3) by the pictures' names, and the (H, W) of the pictures."""
    with np.load(file, allow_pickle=False) as arrays:
        places = dict(zip(arrays["names"].tolist(), arrays["joints"], strict=True))
        height, width = arrays["size"].tolist()
    return places, (height, width)


def heatmaps_of_joints(joints: FloatMap, size: tuple[int, int]) -> FloatMap:
    """A blob for each joint, as pose networks are trained to draw them.

    Args:
        joints: (J, 3): x and y in places of the map, from its left and upper border, and the peak.
        size: (h, w) of the map.

    Returns:
        (J, h, w).
    """
    height, width = size
    sigma = max(height * _SIGMA, 0.5)

    def across(count: int, middle: FloatMap) -> FloatMap:
        away = (np.arange(count, dtype=np.float32) + 0.5 - middle[:, None]) / sigma
        return np.exp(-(away**2) / 2).astype(np.float32)

    blobs = across(height, joints[:, 1])[:, :, None] * across(width, joints[:, 0])[:, None]
    highest = blobs.max((1, 2), keepdims=True)  # below 1 between two places
    peaks: FloatMap = joints[:, 2, None, None] * blobs / np.maximum(highest, 1e-6)
    return peaks


def write_heatmaps(
    paths: Iterable[str | Path],
    estimate: Callable[[Pixels], npt.NDArray[Any]],
    heatmaps: PoseHeatmaps | None = None,
    progress: ProgressBar | None = None,
) -> int:
    """Makes the files that `PoseHeatmaps` reads, for the images that have none yet.

    Args:
        paths: The images.
        estimate: RGB pixels (H, W, 3) of a picture -> heatmaps (17, h, w) of the whole of it.
        heatmaps: Says where the files belong; None: the default place.
        progress: Called with (images done, images).

    Returns:
        The number of files that were written, in float16.

    Raises:
        DataError: An image cannot be read, or the estimate is not such numbers.
        OutputError: The disk is full.
    """
    target, listed, written = heatmaps or PoseHeatmaps(), [*paths], 0
    for done, path in enumerate(listed, 1):
        file = target.file(str(path))
        if not file.exists():
            values = _checked(np.asarray(estimate(read_image(str(path)))), f"{path}: estimate")
            with np.errstate(over="ignore"):
                stored = values.astype(np.float16)
            _checked(stored, f"{path}: estimate in float16")
            with replacing(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, stored, allow_pickle=False)
            written += 1
        if progress is not None:
            progress(done, len(listed))
    return written
