"""Which camera of a data set is which camera of a model: by data set and name, never by chance."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from reid.assembly.data import TrainImages
from reid.data.datasets.base import ReIDDataset
from reid.modeling.weights import WeightsError
from reid.structures import UNKNOWN_CAMERA, ImageRecord

logger = logging.getLogger(__name__)


class Camera(NamedTuple):
    """A camera that a model has learned.

    Attributes:
        site: Whose cameras these are; see `ReIDDataset.site`.
        number: In its data set.
        name: Its name there; empty where cameras have none.
        seen: Whether a training image is of it.
    """

    site: str
    number: int
    name: str = ""
    seen: bool = True


def training_cameras(images: TrainImages) -> list[Camera]:
    """The cameras of the training images, by their number in the model.

    Raises:
        DataError: Files are not what was expected, or cameras have far-off numbers.
    """
    count = images.count_cameras()
    seen = {record.camid for record in images.load()}
    cameras = []
    for number in range(count):
        dataset, own = images.origin_of_camera(number)
        name = dataset.cameras[own] if own < len(dataset.cameras) else ""
        cameras.append(Camera(dataset.site, own, name, number in seen))
    return cameras


def dump_cameras(cameras: Sequence[Camera]) -> str:
    """The cameras as JSON for a weights file's metadata."""
    return json.dumps([list(camera) for camera in cameras])


def read_cameras(metadata: Mapping[str, str], path: str) -> list[Camera] | None:
    """The cameras that a weights file knows; None: it does not say.

    Raises:
        WeightsError: What it says is no list of cameras.
    """
    if "cameras" not in metadata:
        return None
    try:
        cameras = [Camera(*entry) for entry in json.loads(metadata["cameras"])]
        if not all(
            [type(field) for field in camera] == [str, int, str, bool] for camera in cameras
        ):
            raise TypeError
    except (ValueError, TypeError, RecursionError) as error:
        raise WeightsError(
            f"{path}: expected a list of [site, number, name, seen] as cameras in its metadata, "
            f"got {metadata['cameras'][:80]!r}"
        ) from error
    return cameras


def match_camera(cameras: Sequence[Camera], site: str, number: int, name: str) -> int | None:
    """The number in the model of a data set's camera; None: the model has not learned it.

    Of one site, names count where both sides have them, since either may have cameras of its own;
    else numbers do. Of several data sets of one site with that number, none is taken.
    """
    places = [
        place
        for place, camera in enumerate(cameras)
        if camera.site == site
        and camera.seen
        and (camera.name == name if camera.name and name else camera.number == number)
    ]
    return places[0] if len(places) == 1 or (places and name) else None


def renumber_cameras(
    cameras: Sequence[Camera] | None, records: Sequence[ImageRecord], dataset: ReIDDataset
) -> list[ImageRecord]:
    """A data set's images as the model sees them: a camera has the number it had in training.

    Cameras that the model has not learned become unknown ones, and a line says which.

    Args:
        cameras: Of the model; None: it knows of no cameras, or not whose. Numbers stay.
        records: The images.
        dataset: They are of it, and loaded.
    """
    if cameras is None:
        return list(records)
    names = dataset.cameras
    present = sorted({record.camid for record in records} - {UNKNOWN_CAMERA})
    numbers = {
        camid: match_camera(
            cameras, dataset.site, camid, names[camid] if camid < len(names) else ""
        )
        for camid in present
    }
    unknown = [camid for camid in present if numbers[camid] is None]
    if unknown:
        words = [names[camid] if camid < len(names) else str(camid) for camid in unknown]
        logger.info(
            "%s: the model has not learned %s of its %d cameras (%s%s); their images get the mean "
            "of the cameras that it has learned",
            dataset.site,
            len(unknown),
            len(present),
            ", ".join(words[:6]),
            ", ..." if len(words) > 6 else "",
        )
    known = {camid: number for camid, number in numbers.items() if number is not None}
    return [replace(record, camid=known.get(record.camid, UNKNOWN_CAMERA)) for record in records]


def carry_cameras(
    table: Tensor, old: Sequence[Camera] | None, new: Sequence[Camera], path: str
) -> Tensor:
    """A table of camera embeddings for other cameras, to go on training with.

    A camera that the weights know, by data set and name, keeps its row; the others start from the
    mean of the rows that were learned. A row of zeros belongs to a camera without training images.

    Args:
        table: (C, ...) of the weights.
        old: Whose rows these are; None: the file does not say.
        new: Cameras of the training images, by number.
        path: Of the weights, for the log.
    """
    learned = table.flatten(1).any(1)
    mean = table[learned].mean(0) if bool(learned.any()) else torch.zeros_like(table[0])
    carried = mean.expand(len(new), *mean.shape).clone()
    matched = 0
    for place, camera in enumerate(new):
        row = match_camera(old or (), camera.site, camera.number, camera.name)
        if row is not None and row < len(table) and bool(learned[row]):
            carried[place] = table[row]
            matched += 1
        if not camera.seen:
            carried[place] = 0
    reason = "" if old is not None else "; the file does not say whose cameras it knows"
    logger.info(
        "Cameras: %d of %d are known to %s by data set and name; the others start from the mean of "
        "its %d%s",
        matched,
        len(new),
        path,
        int(learned.sum()),
        reason,
    )
    return carried
