"""Matches the cameras of a data set with those that a model knows, by data set and name."""

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
        site: The place where the camera stands; see `ReIDDataset.site`.
        number: The camera's number in its data set.
        name: The camera's name in its data set; empty if cameras have no names.
        seen: Whether a training image comes from this camera.
    """

    site: str
    number: int
    name: str = ""
    seen: bool = True


def training_cameras(images: TrainImages) -> list[Camera]:
    """The cameras of the training images, in the order of their numbers in the model.

    Raises:
        DataError: The data set's files are wrong, or the camera numbers have large gaps.
    """
    count = images.count_cameras()
    seen = {record.camid for record in images.load()}
    cameras = []
    for number in range(count):
        dataset, there = images.origin_of_camera(number)
        name = dataset.cameras[there] if there < len(dataset.cameras) else ""
        cameras.append(Camera(dataset.site, there, name, number in seen))
    return cameras


def dump_cameras(cameras: Sequence[Camera]) -> str:
    """The cameras as JSON for a weights file's metadata."""
    return json.dumps([list(camera) for camera in cameras])


def read_cameras(metadata: Mapping[str, str], path: str) -> list[Camera] | None:
    """The cameras that a weights file names; None: it names none.

    Raises:
        WeightsError: The entry is not a list of cameras.
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
    """The model's number for a camera of a data set; None: the model has not learned this camera.

    Cameras match if they belong to the same site and have the same name, or the same number where
    one of them has no name. If the number fits several cameras of a site, none of them matches.
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
    """Gives the cameras of a data set's images the numbers that the model knows them by.

    Cameras that the model has not learned become unknown, and the log names them.

    Args:
        cameras: The model's cameras; None: the model uses no cameras, or its weights do not name
            them, and numbers stay.
        records: The images.
        dataset: The data set of the images, loaded.
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
    """Turns the camera embeddings of trained weights into embeddings for the training cameras.

    A camera that the weights know, by data set and name, keeps its row. The other cameras start
    with the mean of the learned rows. Cameras without training images get zeros.

    Args:
        table: (C, ...) camera embeddings of the weights.
        old: The camera of each row; None: the file does not say.
        new: The cameras of the training images, in the order of their numbers.
        path: The weights file, for the log.
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
    reason = "" if old is not None else "; the file does not name its cameras"
    logger.info(
        "Cameras: %s knows %d of %d by data set and name; the others start from the mean of its "
        "%d%s",
        path,
        matched,
        len(new),
        int(learned.sum()),
        reason,
    )
    return carried
