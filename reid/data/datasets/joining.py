"""Datasets put together, and datasets without some of their images."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reid.data.datasets.base import ReIDDataset, Split, backslash_hint
from reid.files import InputError, read_text
from reid.structures import UNKNOWN_CAMERA, UNLABELLED, DataError, ImageRecord

logger = logging.getLogger(__name__)

Origin = tuple[str, int]
"""Name of a dataset, and a number in it."""


@dataclass(frozen=True)
class JoinedImages:
    """Images of several datasets, with identities and cameras numbered anew.

    Attributes:
        records: In the order of the datasets; `source` names the dataset, `domain` counts it.
        identities: Where each identity comes from, by its number.
        cameras: Where each camera comes from, by its number.
    """

    records: list[ImageRecord]
    identities: tuple[Origin, ...]
    cameras: tuple[Origin, ...]


def join_images(parts: Sequence[tuple[str, Sequence[ImageRecord]]]) -> JoinedImages:
    """Joins datasets; identities and cameras of different datasets stay different.

    Numbers of a dataset follow those of the dataset before, in their old order and without gaps; -1
    stays -1.

    Args:
        parts: Name and images of each dataset; the names differ.
    """
    identities = _origins(parts, lambda record: record.pid)
    cameras = _origins(parts, lambda record: record.camid)
    pids = {origin: number for number, origin in enumerate(identities)}
    camids = {origin: number for number, origin in enumerate(cameras)}
    records = [
        replace(
            record,
            pid=pids.get((name, record.pid), UNLABELLED),
            camid=camids.get((name, record.camid), UNKNOWN_CAMERA),
            domain=domain,
            source=name,
        )
        for domain, (name, part) in enumerate(parts)
        for record in part
    ]
    return JoinedImages(records, identities, cameras)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names; a repeated one gets a number.

    >>> unique_names(["own", "own", "Market1501"])
    ['own', 'own (2)', 'Market1501']
    """
    found: list[str] = []
    for name in names:
        number, other = 1, name
        while other in found:
            number += 1
            other = f"{name} ({number})"
        found.append(other)
    return found


class PartOfDataset(ReIDDataset):
    """A dataset without some of its images; all other facts are those of the whole dataset.

    Args:
        dataset: The whole dataset.
    """

    def __init__(self, dataset: ReIDDataset) -> None:
        super().__init__(str(dataset.root))
        self._dataset = dataset

    @property
    def name(self) -> str:  # type: ignore[override]  # other datasets set an attribute
        """The whole dataset's name."""
        return self._dataset.name

    @property
    def version(self) -> str:  # type: ignore[override]  # known once the dataset is loaded
        """The whole dataset's version."""
        return self._dataset.version

    @property
    def same_numbers(self) -> bool:  # type: ignore[override]  # elsewhere a plain attribute
        """Whether a number means the same identity in training and test."""
        return self._dataset.same_numbers

    @property
    def site(self) -> str:
        """The whole dataset's site."""
        return self._dataset.site

    @property
    def scanned_folder(self) -> Path | None:
        """The whole dataset's folder."""
        return self._dataset.scanned_folder

    @property
    def cameras(self) -> tuple[str, ...]:  # type: ignore[override]  # known once it is loaded
        """The whole dataset's cameras."""
        return self._dataset.cameras

    def has_train(self) -> bool:
        """Whether the whole dataset has training images."""
        return self._dataset.has_train()

    def has_test(self) -> bool:
        """Whether the whole dataset has query and gallery."""
        return self._dataset.has_test()

    def missing_splits(self) -> Mapping[Split, Path]:
        """The splits that this copy of the whole dataset lacks."""
        return self._dataset.missing_splits()


class LeaveOut(PartOfDataset):
    """A dataset without the images that a file lists.

    Args:
        dataset: The whole dataset.
        file: One path a line, absolute or relative to the root of datasets. Empty lines and lines
            that start with `#` are ignored (`./#1.jpg` is a path).

    Raises:
        ValueError: The file is missing or is not text.
    """

    def __init__(self, dataset: ReIDDataset, file: Path) -> None:
        super().__init__(dataset)
        self._file = file
        self._left_out = frozenset(_read_list(file, dataset.root))
        missing = sorted(path for path in self._left_out if not os.path.lexists(path))
        if missing:
            logger.warning(
                "%s: %s of %s paths are no files, the first is %r%s",
                file,
                f"{len(missing):,}",
                f"{len(self._left_out):,}",
                missing[0],
                backslash_hint(missing[0]),
            )

    def load(self, split: Split) -> list[ImageRecord]:
        """The images of a split that are not left out, in the dataset's order.

        Raises:
            DataError: The dataset cannot be loaded, or no image is left.
        """
        records = self._dataset.load(split)
        kept = [record for record in records if _plain(record.path) not in self._left_out]
        logger.info(
            "%s %s: %s of %s images left out, as %s says",
            self.name,
            split,
            f"{len(records) - len(kept):,}",
            f"{len(records):,}",
            self._file,
        )
        if not kept:
            raise DataError(f"{self._file}: leaves out every image of {self.name} {split}")
        return kept


def _origins(
    parts: Sequence[tuple[str, Sequence[ImageRecord]]], number: Callable[[ImageRecord], int]
) -> tuple[Origin, ...]:
    return tuple(
        (name, value)
        for name, records in parts
        for value in sorted({number(record) for record in records} - {-1})
    )


def _read_list(file: Path, root: Path) -> Iterable[str]:
    try:
        lines = read_text(file, errors="surrogateescape").split("\n")
    except InputError as error:
        raise ValueError(f"leave_out: {error}; expected a text file with a path a line") from error
    for line in lines:
        if line.strip() and not line.lstrip().startswith("#"):
            yield _plain(root / line.rstrip("\r"))


def _plain(path: str | Path) -> str:
    """An absolute path without `.` and `..`; links are not followed."""
    return os.path.abspath(path)  # noqa: PTH100  (Path.absolute keeps `..`)
