"""The base of datasets, and what common folder layouts share."""

from __future__ import annotations

import difflib
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Literal

from reid.data.images import why_not_read
from reid.data.scan import Scan, scan_folder
from reid.files import InputError, read_text
from reid.structures import DataError, ImageRecord

logger = logging.getLogger(__name__)

Split = Literal["train", "query", "gallery"]
_OTHER_WORDS = {"person": "pid", "ident": "pid", "cam": "camid"}
_MARKET_NAME = re.compile(r"(-1|\d+)_c(\d+)(?!\d)")
MARKET_FOLDERS: Mapping[Split, str] = {
    "train": "bounding_box_train",
    "query": "query",
    "gallery": "bounding_box_test",
}


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """The size of a split, counted as `ReIDDataset.load` gives it; None: not published.

    Attributes:
        identities: Different identities from 0; distractors count as one (identity 0), junk (-1)
            does not count.
        images: All images, with distractors and junk.
        cameras: Different cameras from 0.
    """

    identities: int | None = None
    images: int | None = None
    cameras: int | None = None

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> SplitCounts:
        """The counts of these records."""
        return cls(
            len({record.pid for record in records if record.pid >= 0}),
            len(records),
            len({record.camid for record in records if record.camid >= 0}),
        )


class ReIDDataset(ABC):
    """Images of persons, or vehicles, in three splits.

    Nothing is read before `load`.

    Args:
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.

    Attributes:
        name: For tables and messages.
        root: Folder of all datasets.
        version: The version or layout that `load` read, if several circulate; else empty. Empty
            before `load` too.
        same_numbers: Whether a number means the same identity in training and test; if not, a
            number that both have means different persons.
        cameras: Names of the cameras in the order of their numbers, once images are loaded; empty
            if they have no names.
        is_validation: Whether query and gallery were taken out of the training images: then they
            serve to choose settings and are not a test set.
    """

    name: str
    version: str = ""
    same_numbers: bool = True
    cameras: tuple[str, ...] = ()
    is_validation: bool = False

    def __init__(self, root: str = "") -> None:
        self.root = Path(root or os.environ.get("REID_DATASETS", "datasets"))

    @property
    def site(self) -> str:
        """Whose cameras these are: in datasets of one site a number means the same camera.

        A benchmark's name, or the folder of a user's images.
        """
        return self.name

    @property
    def scanned_folder(self) -> Path | None:
        """The folder whose pictures all belong to the set; None: a list or the names decide.

        No other code may write pictures there.
        """
        return None

    @abstractmethod
    def load(self, split: Split) -> list[ImageRecord]:
        """The images of a split, in an order that depends on their names alone.

        Raises:
            DataError: A folder or list is missing or empty, or a name does not parse.
        """

    def has_train(self) -> bool:
        """Whether there are training images; the benchmarks have them."""
        return True

    def has_test(self) -> bool:
        """Whether there are query and gallery; the benchmarks have them."""
        return True

    def missing_splits(self) -> Mapping[Split, Path]:
        """Splits that this copy of the data set lacks, and the paths where they belong.

        Raises:
            DataError: There is no folder of the data set at all.
        """
        return {}

    def published(self) -> Mapping[Split, SplitCounts]:
        """The counts that a paper or an official page states; empty where there are none."""
        return {}

    def find_folder(self, candidates: Sequence[str], layout: str) -> Path:
        """The first of some folders below the root that exists.

        Raises:
            DataError: There is none; names what was tried, and the layout expected.
        """
        for candidate in candidates:
            if (self.root / candidate).is_dir():
                return self.root / candidate
        tried = " or ".join(str((self.root / candidate).absolute()) for candidate in candidates)
        setting = os.environ.get("REID_DATASETS")
        raise DataError(
            f"{self.name}: there is no folder {tried}\n"
            f"expected there: {layout}\n"
            + (
                f"REID_DATASETS is {setting!r}"
                if setting
                else "REID_DATASETS is not set, so datasets lie in datasets/ of the present folder"
            )
        )


class MarketLike(ReIDDataset):
    """A dataset of three folders whose names start with `PID_cCAMERA`, as those of Market-1501 do.

    Attributes:
        candidates: Folders below the root where it may be, the likeliest first.
        layout: What is expected there, for messages.
        folders: The folder of each split.
    """

    candidates: Sequence[str]
    layout: str
    folders: Mapping[Split, str] = MARKET_FOLDERS

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of their names."""
        folder = self.find_folder(self.candidates, self.layout)
        return scan_market_folder(folder / self.folders[split], self.layout)

    def has_train(self) -> bool:
        """Whether the folder of the training images is there.

        Raises:
            DataError: There is no folder of the data set at all.
        """
        return "train" not in self.missing_splits()

    def has_test(self) -> bool:
        """Whether the folders of query and gallery are there.

        Raises:
            DataError: There is no folder of the data set at all.
        """
        return not self.missing_splits().keys() & {"query", "gallery"}

    def missing_splits(self) -> Mapping[Split, Path]:
        """Splits whose folder is not there, and its path.

        Raises:
            DataError: There is no folder of the data set at all.
        """
        folder = self.find_folder(self.candidates, self.layout)
        places = {split: folder / name for split, name in self.folders.items()}
        return {split: place for split, place in places.items() if not place.is_dir()}


def scan_market_folder(folder: Path, layout: str) -> list[ImageRecord]:
    """The images of a folder whose names start with `PID_cCAMERA`, as those of Market-1501 do.

    Identity -1 is junk; 0000 stays an identity of its own, which no query has: a distractor.
    Cameras are counted from 1 in the names, from 0 in the records. Other files, such as
    `Thumbs.db`, are passed over.

    Raises:
        DataError: The folder is missing or has no image, a name does not parse, or all
            pictures of a camera are of a kind that is not read.
    """
    scan = list_images(folder, layout)
    records = []
    for name in scan.images:
        match = _MARKET_NAME.match(name)
        if match is None or int(match[2]) < 1:
            raise DataError(
                f"{folder / name}: the name does not tell identity and camera; expected "
                f"PID_cCAMERA..., e.g. 0002_c1s1_000451_03.jpg; expected layout: {layout}"
            )
        records.append(ImageRecord(f"{folder}/{name}", int(match[1]), int(match[2]) - 1))

    def camera(name: str) -> str | None:
        match = _MARKET_NAME.match(name)
        return None if match is None else str(int(match[2]))

    check_cameras(scan, {str(record.camid + 1) for record in records}, camera, folder)
    return records


def image_names(folder: Path, layout: str) -> list[str]:
    """The names of the images of a folder, sorted; other files are passed over.

    Raises:
        DataError: The folder is missing or has no image.
    """
    return list_images(folder, layout).images


def list_images(folder: Path, layout: str) -> Scan:
    """The images of a folder, without its subfolders; the log says what was passed over.

    Raises:
        DataError: The folder is missing or has no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected layout: {layout}")
    scan = scan_folder(folder)
    if not scan.images:
        raise DataError(no_image(folder, layout, scan))
    if scan.passed_over():
        level = logging.WARNING if scan.unread else logging.INFO
        logger.log(level, "%s: passed over %s", folder, scan.passed_over())
    return scan


def no_image(source: Path, layout: str, scan: Scan | None = None) -> str:
    """The message for a data set without images."""
    passed_over = "" if scan is None else scan.passed_over()
    found = f" but {passed_over}" if passed_over else ""
    return f"{source}: no image found{found}; expected layout: {layout}"


def check_cameras(
    scan: Scan, read: Collection[str], camera: Callable[[str], str | None], source: Path
) -> None:
    """Checks that no camera vanishes because its pictures are of a kind that is not read.

    Args:
        scan: What lies below `source`.
        read: The cameras of the images that are read.
        camera: The camera of a picture by its path in `scan`; None: it has none.
        source: The folder, for messages.

    Raises:
        DataError: All pictures of a camera are of such kinds.
    """
    for kind, paths in scan.unread.items():
        lost: dict[str, list[str]] = {}
        for path in paths:
            name = camera(path)
            if name is not None and name not in read:
                lost.setdefault(name, []).append(path)
        for name, pictures in lost.items():
            raise DataError(
                f"{source}: camera {name!r} has no image that is read, but {len(pictures):,} "
                f"{kind} pictures, the first is {pictures[0]!r}; {why_not_read(kind)}, or move "
                "them out of the data"
            )


def read_lines(path: Path, layout: str) -> Iterator[tuple[str, str]]:
    """The non-empty lines of a list, each with its place for messages.

    Raises:
        DataError: The list is missing, is not a regular file, or is not text.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such list; expected layout: {layout}")
    try:
        text = read_text(path)
    except InputError as error:
        raise DataError(f"{error}; expected layout: {layout}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def not_empty(
    records: list[ImageRecord], source: Path, layout: str, scan: Scan | None = None
) -> list[ImageRecord]:
    """`records`, if there are any; `scan` says what else the folder holds.

    Raises:
        DataError: There are no records.
    """
    if not records:
        raise DataError(no_image(source, layout, scan))
    return records


def join_below(folder: Path, listed: str, where: str, *, allow_outside: bool = False) -> Path:
    """The path of an image that a list names, below the folder that the list is about.

    An absolute path below the folder counts as the relative one. Symbolic links below the folder
    may lead anywhere, since the folder's owner made them; the text of a list may not.

    Args:
        folder: What `listed` is relative to.
        listed: The path as the list has it.
        where: Names the list and the line in messages.
        allow_outside: Takes any path.

    Raises:
        DataError: The path is empty, absolute and not below the folder, or has `..` in it, under
            the rules of any system.
    """
    if not listed or "\0" in listed:
        raise DataError(f"{where}: {listed!r} is no path; expected one relative to {folder}")
    # Parsing 100,000 paths takes seconds, and nearly none has anything suspect in it.
    suspect = ".." in listed or ":" in listed or listed[0] in "/\\"
    if not suspect or allow_outside:
        return folder / listed
    path, windows = Path(listed), PureWindowsPath(listed)  # Windows separates by / and \
    if ".." not in windows.parts:
        if not path.anchor and not windows.is_absolute():
            return folder / path
        for find in (folder.absolute, folder.resolve):  # the folder's path with links, and without
            if path.is_relative_to(base := find()):
                return folder / path.relative_to(base)
    raise DataError(
        f"{where}: {listed!r} leaves the folder; paths are relative to {folder} and may not go up"
    )


def check_files(records: Iterable[ImageRecord], source: Path) -> None:
    """Checks that the images of a list exist.

    Raises:
        DataError: One does not exist, or is not a regular file.
    """
    for record in records:
        # Path.is_file takes twice the time, and stops at a name that is too long.
        if not os.path.isfile(record.path):  # noqa: PTH113
            if os.path.exists(record.path):  # noqa: PTH110
                raise DataError(f"{record.path}: is no file, but {source} lists it as an image")
            raise DataError(
                f"{record.path}: there is no such image, but {source} lists it"
                + backslash_hint(record.path)
            )


def backslash_hint(path: str) -> str:
    """What to do about a missing path with backslashes, as Windows has them; empty for others."""
    if os.sep == "\\" or "\\" not in path:
        return ""
    slashes = path.replace("\\", "/")
    there = f" ({slashes} is there)" if os.path.isfile(slashes) else ""  # noqa: PTH113
    return f"; Windows puts backslashes between folders, write / in their place{there}"


def check_spelling(names: Iterable[str], known: Sequence[str]) -> None:
    """Checks that no name is another word for a known one that is missing.

    Unknown names are only stored, so a misspelt `pid` would leave a dataset without identities.

    Raises:
        ValueError: One seems to be, such as `PID`, `camera` or `person_id`.
    """
    present = set(names)
    for name in sorted(present.difference(known)):
        word = name.strip().lower().replace("_", "")
        near = [other for start, other in _OTHER_WORDS.items() if word.startswith(start)]
        near += difflib.get_close_matches(word, known, n=1)
        if near and near[0] in known and near[0] not in present:
            raise ValueError(f"{name!r}: did you mean {near[0]!r}? If not, give it another name")


def list_numbers(items: Iterable[tuple[int, str]], most: int = 20) -> str:
    """What numbers stand for, in words: `0 = 'cam2', 1 = 'cam10'`."""
    texts = [f"{number} = {name!r}" for number, name in items]
    more = f", ... {len(texts)} in all" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
