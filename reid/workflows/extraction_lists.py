"""Lists the images to extract: of folders, lists, single files, or data sets by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reid.assembly.cameras import renumber_cameras
from reid.assembly.data import build_dataset, spec_of_words
from reid.assembly.model_card import ModelCard
from reid.data.datasets.base import ReIDDataset, Split
from reid.data.datasets.csv_dataset import CSV
from reid.data.scan import natural_key, scan_images
from reid.files import InputError, read_text
from reid.registry import ConfigError
from reid.structures import UNKNOWN_CAMERA, DataError, ImageRecord

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "query", "gallery")
_TABLES = (".csv", ".tsv")
_TEXTS = (".txt", ".lst")
_SHOWN = 6


@dataclass(frozen=True)
class ImageList:
    """Images to extract.

    Attributes:
        name: For messages.
        records: The N images, with the numbers of their data set.
        seen: The same images with the camera numbers of the model's training.
        cameras: N names of cameras; empty: unknown.
        splits: N splits; empty: no split.
    """

    name: str
    records: list[ImageRecord]
    seen: list[ImageRecord]
    cameras: list[str]
    splits: list[str]


def list_dataset(words: Sequence[str], card: ModelCard, splits: Sequence[Split] = ()) -> ImageList:
    """The images of a data set.

    Args:
        words: NAME KEY VALUE KEY VALUE.
        card: Of the model.
        splits: Which; none: query and gallery where there are such, else the training images.

    Raises:
        ConfigError: The name or an option is wrong.
        DataError: Its files are not what was expected.
    """
    return _of_dataset(build_dataset(spec_of_words(words), "--dataset"), card, splits)


def list_paths(
    paths: Sequence[Path], card: ModelCard, *, camera_folders: bool = False
) -> ImageList:
    """The images of folders, of lists and single ones, in this order.

    Args:
        paths: Folders, with all images anywhere below; text files (.txt, .lst) with a path a line,
            relative to the file's folder; pictures; or one list with a header (.csv, .tsv), as the
            data set `CSV` takes it.
        card: Of the model.
        camera_folders: Images in the folder `entrance` of a folder that was given are of the
            camera `entrance`, whose name the model may have learned.

    Raises:
        ConfigError: A list with a header is not alone.
        DataError: A file or folder is missing or broken, or there is no image.
    """
    tables = [path for path in paths if path.suffix.lower() in _TABLES]
    if tables and len(paths) > 1:
        raise ConfigError(
            f"{tables[0]}: pass a list with cameras and identities alone, got {len(paths)} paths"
        )
    if tables:
        dataset = CSV(str(tables[0].absolute()), allow_outside=True)
        return _of_dataset(dataset, card, ())
    images: list[tuple[str, str]] = []
    for path in paths:
        images += _below(path, camera_folders)
    if not images:
        raise DataError(f"{', '.join(map(str, paths[:_SHOWN]))}: there is no image")
    names = sorted({camera for _, camera in images if camera}, key=natural_key)
    numbers = {name: number for number, name in enumerate(names)}
    in_model = _learned(names, card)
    records = [ImageRecord(path, camid=numbers.get(name, UNKNOWN_CAMERA)) for path, name in images]
    seen = [
        replace(record, camid=in_model.get(name, UNKNOWN_CAMERA))
        for record, (_, name) in zip(records, images, strict=True)
    ]
    cameras = [camera for _, camera in images]
    return ImageList(paths[0].name or str(paths[0]), records, seen, cameras, [""] * len(images))


def _below(path: Path, camera_folders: bool) -> Iterable[tuple[str, str]]:
    """(path, camera) of the images of a folder, a text file or a single path."""
    if path.is_dir():
        scan = scan_images(path)
        if scan.passed_over():
            logger.warning("%s: skipped %s", path, scan.passed_over())
        for name in scan.images:
            folder, separator, _ = name.partition("/")
            yield f"{path}/{name}", folder if separator and camera_folders else ""
    elif path.suffix.lower() in _TEXTS:
        try:
            lines = read_text(path, errors="surrogateescape").splitlines()
        except InputError as error:
            raise DataError(f"{error}; expected a path a line") from error
        yield from ((str(path.parent / line.strip()), "") for line in lines if line.strip())
    elif path.exists():
        yield str(path), ""
    else:
        raise DataError(f"{path}: there is no such file or folder")


def _of_dataset(dataset: ReIDDataset, card: ModelCard, splits: Sequence[Split]) -> ImageList:
    records: list[ImageRecord] = []
    names: list[str] = []
    for split in splits or _splits_of(dataset):
        loaded = dataset.load(split)
        records += loaded
        names += [split] * len(loaded)
    cameras = [_camera_name(dataset, record.camid) for record in records]
    seen = renumber_cameras(card.learned_cameras(), records, dataset)
    return ImageList(dataset.name, records, seen, cameras, names)


def _splits_of(dataset: ReIDDataset) -> tuple[Split, ...]:
    """All splits of a list; of another data set query and gallery, or else the training images."""
    if isinstance(dataset, CSV) and dataset.has_train():
        return SPLITS if dataset.has_test() else ("train",)
    return ("query", "gallery") if dataset.has_test() else ("train",)


def _camera_name(dataset: ReIDDataset, camid: int) -> str:
    if camid == UNKNOWN_CAMERA:
        return ""
    return dataset.cameras[camid] if camid < len(dataset.cameras) else str(camid)


def _learned(names: Sequence[str], card: ModelCard) -> dict[str, int]:
    """The number in the model of each camera that it has learned; logs the others."""
    numbers: dict[str, int] = {}
    unknown = []
    for name in names if card.cameras is not None else ():
        try:
            numbers[name] = card.camera_number(name)
        except ValueError:
            unknown.append(name)
    if unknown:
        logger.info(
            "The model has not learned %d of %d cameras (%s%s); their images get the mean of the "
            "learned cameras",
            len(unknown),
            len(names),
            ", ".join(unknown[:_SHOWN]),
            ", ..." if len(unknown) > _SHOWN else "",
        )
    return numbers
