"""Copies images of a data set as bare crops, as a user's own cameras would give them."""

from __future__ import annotations

import csv
import io
import random
import shutil
from pathlib import Path

from reid.data.datasets.base import ReIDDataset, Split
from reid.files import open_regular, write_text, writing
from reid.structures import UNKNOWN_CAMERA, DataError

LABELS = "labels.csv"


def export_crops(dataset: ReIDDataset, folder: Path, *, labelled: bool = False) -> str:
    """Copies images into a folder for each camera, under names that tell no identity.

    The dataset `Folder` can read them: `camera1/000000.jpg`, with cameras counted from 1 and images
    numbered in a shuffled order that is the same in every run. If no camera is known, there are no
    camera folders.

    Args:
        dataset: Its training images are copied.
        folder: A new folder.
        labelled: Copies query and gallery images too, mixed with the others, and writes
            `labels.csv` with their path, pid, camid (as `Folder` numbers the cameras) and split,
            for the dataset `CSV`.

    Returns:
        What was written, in a line.

    Raises:
        DataError: The folder exists, query and gallery are asked for but missing,
            some cameras are known and others not, or an image cannot be copied.
        OutputError: A folder cannot be made, or the list not written.
    """
    if folder.exists():
        raise DataError(f"{folder}: is there already; expected the name of a new folder")
    if labelled and not dataset.has_test():
        raise DataError(f"{dataset.name}: has no query and gallery to label")
    splits: tuple[Split, ...] = ("train", "query", "gallery") if labelled else ("train",)
    images = [(record, split) for split in splits for record in dataset.load(split)]
    cameras = sorted({record.camid for record, _ in images})
    if UNKNOWN_CAMERA in cameras and len(cameras) > 1:
        raise DataError(f"{dataset.name}: some cameras are known and others not")
    numbers = list(range(len(images)))
    random.Random(0).shuffle(numbers)
    width = max(6, len(str(len(images))))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "pid", "camid", "split"))
    shuffled = sorted(zip(images, numbers, strict=True), key=lambda image: image[1])
    for (record, split), number in shuffled:
        camera = "" if record.camid == UNKNOWN_CAMERA else f"camera{record.camid + 1}/"
        listed = f"{camera}{number:0{width}d}{Path(record.path).suffix.lower()}"
        path = folder / listed
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_regular(record.path) as source, path.open("xb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise DataError(f"{record.path}: cannot be copied to {path} ({error})") from error
        if split != "train":
            camid = cameras.index(record.camid) if camera else ""
            writer.writerow((listed, record.pid, camid, split))
    written = (
        f"{folder}: {len(images):,} images of {len(cameras) if cameras[0] >= 0 else 'no'} cameras"
    )
    if labelled:
        write_text(folder / LABELS, text.getvalue())
        tested = sum(split != "train" for _, split in images)
        written += f", {tested:,} of them labelled in {folder / LABELS}"
    return written
