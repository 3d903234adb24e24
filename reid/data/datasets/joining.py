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
"""Name of a dataset, and a number there."""


@dataclass(frozen=True)
class JoinedImages:
    """Images of several datasets, with identities and cameras of their own.

    Attributes:
        records: In the order of the datasets; `source` names the dataset, `domain` counts it.
        identities: Where each identity comes from, by its number.
        cameras: Where each camera comes from, by its number.
    """

    records: list[ImageRecord]
    identities: tuple[Origin, ...]
    cameras: tuple[Origin, ...]


def join_images(parts: Sequence[tuple[str, Sequence[ImageRecord]]]) -> JoinedImages:
    """Joins datasets: no identity and no camera of one is taken for one of another.

    Those of a dataset follow those of the one before, in the order of their own numbers and
    without gaps. -1 stays -1.

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
    """The names, with a number after those that came before.

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
    """A dataset without some of its images; all else is the dataset's.

    Args:
        dataset: All images.
    """

    def __init__(self, dataset: ReIDDataset) -> None:
        super().__init__(str(dataset.root))
        self._dataset = dataset

    @property
    def name(self) -> str:  # type: ignore[override]  # a dataset's own may be set when it is built
        """The dataset's."""
        return self._dataset.name

    @property
    def version(self) -> str:  # type: ignore[override]  # known once the dataset is loaded
        """The dataset's."""
        return self._dataset.version

    @property
    def same_numbers(self) -> bool:  # type: ignore[override]  # a class's own is a plain attribute
        """The dataset's."""
        return self._dataset.same_numbers

    @property
    def site(self) -> str:
        """The dataset's."""
        return self._dataset.site

    @property
    def scanned_folder(self) -> Path | None:
        """The dataset's."""
        return self._dataset.scanned_folder

    @property
    def cameras(self) -> tuple[str, ...]:  # type: ignore[override]  # known once it is loaded
        """The dataset's."""
        return self._dataset.cameras

    def has_train(self) -> bool:
        """The dataset's answer."""
        return self._dataset.has_train()

    def has_test(self) -> bool:
        """The dataset's answer."""
        return self._dataset.has_test()

    def missing_splits(self) -> Mapping[Split, Path]:
        """The dataset's answer."""
        return self._dataset.missing_splits()


class LeaveOut(PartOfDataset):
    """A dataset without the images that a file lists.

    Args:
        dataset: All images.
        file: A path a line, absolute or relative to the root of datasets. Empty lines and lines
            that start with `#` say nothing (`./#1.jpg` is a path).

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
            DataError: As the dataset does; or none is left.
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
    """An absolute path without `.` and `..`, with links as they are."""
    return os.path.abspath(path)  # noqa: PTH100  (Path.absolute keeps `..`)
