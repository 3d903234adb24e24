"""Labelled persons as a list for the dataset `CSV`: train, query and gallery by a stated rule."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reid.evaluation.matches import camera_name
from reid.files import InputError, OutputError, read_json, write_text
from reid.structures import UNKNOWN_CAMERA, UNLABELLED, ImageRecord
from reid.workflows.review.judgements import NOBODY, Judgements

logger = logging.getLogger(__name__)

WRITTEN = "written.json"
"""A file in the review's folder that names the lists it has written; it overwrites no others."""
_PARTS = 2**32


@dataclass(frozen=True)
class LabelledSplits:
    """Which labelled images are for training and which for tests, by number.

    The rule: a person needs two images or more. A hash of the person's first labelled image assigns
    `test_share` of the persons to tests and the others to training, so persons do not change sides
    as labels grow; if two persons turn out to be one, the one labelled earlier decides. Each test
    person that at least two cameras have seen has one query from each camera, chosen by hash and
    not by how sure the model is; if cameras are unknown, one image of each test person is a query.
    All images of test persons are in the gallery, queries too (evaluation ignores an image as its
    own match); persons of one camera are distractors. Junk is in the gallery with identity -1 and
    does not count.

    Attributes:
        train: Images.
        query: Images.
        gallery: Images.
        pid: (N,) identity, from 0 in the order of labelling; -1: none.
        persons: Labelled in all.
        train_persons: For training.
        test_persons: For tests, with at least one query.
        distractors: For tests, without a query.
    """

    train: list[int]
    query: list[int]
    gallery: list[int]
    pid: npt.NDArray[np.int64]
    persons: int
    train_persons: int
    test_persons: int
    distractors: int


def split_labels(
    judgements: Judgements,
    records: Sequence[ImageRecord],
    groups: Sequence[Sequence[int]],
    test_share: float,
) -> LabelledSplits:
    """Applies the rule that `LabelledSplits` states.

    Args:
        judgements: What is known of the N images.
        records: The N images.
        groups: Images that answers have said to be of one person, from the oldest answer to the
            newest.
        test_share: From 0 (all persons for training) to 1 (all for tests).
    """
    founders: dict[int, int] = {}
    for group in groups:
        for image in group:
            person = int(judgements.person[image])
            if person != NOBODY:
                founders.setdefault(person, image)
    pid = np.full(len(records), UNLABELLED, np.int64)
    train: list[int] = []
    query: list[int] = []
    gallery: list[int] = []
    counts = {"train": 0, "test": 0, "distractors": 0}
    labelled = set(judgements.persons())
    persons = [(person, image) for person, image in founders.items() if person in labelled]
    for number, (person, founder) in enumerate(persons):
        images = sorted(judgements.members(person))
        pid[images] = number
        if _hash(records[founder].path) >= test_share * _PARTS:
            train += images
            counts["train"] += 1
            continue
        gallery += images
        queries = _queries(images, records)
        query += queries
        counts["test" if queries else "distractors"] += 1
    gallery += np.flatnonzero(judgements.junk).tolist()
    return LabelledSplits(
        train, query, gallery, pid, len(persons),
        counts["train"], counts["test"], counts["distractors"],
    )  # fmt: skip


class LabelList:
    """The list on disk.

    Args:
        path: The CSV file.
        folder: Of the review.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._note = folder / WRITTEN

    def write(self, splits: LabelledSplits, records: Sequence[ImageRecord]) -> str:
        """Writes the list; returns a word on what was left out, or nothing.

        A path is relative to the list's folder where the image lies below it, else absolute.

        Raises:
            OutputError: The file is there and was not written by this review, or cannot be
                written.
        """
        self.check()
        text, lost = self._text(splits, records)
        data = text.encode("utf-8")
        notes = self._notes()
        notes[self._key] = hashlib.sha256(data).hexdigest()
        # Noted first: a kill between the two leaves a list that may be written again.
        old = self._digest()
        write_text(self._note, json.dumps({**notes, f"{self._key} before": old}, indent=2) + "\n")
        write_text(self.path, text)
        return f"{lost:,} images are left out, since their paths are not UTF-8" if lost else ""

    def check(self) -> None:
        """Makes sure that no other's list is overwritten.

        Raises:
            OutputError: The file is there, and this review has not written it.
        """
        notes = self._notes()
        known = {notes.get(self._key), notes.get(f"{self._key} before")} - {None, ""}
        if self.path.exists() and self._digest() not in known:
            raise OutputError(
                f"{self.path}: exists, and this review has not written it, or it was changed "
                "since; move it away, or give another name with --labels"
            )

    def needs_outside(self, records: Sequence[ImageRecord]) -> bool:
        """Whether images lie outside the list's folder, so that `CSV` needs ALLOW_OUTSIDE."""
        base = self._base()
        return not all(os.path.abspath(record.path).startswith(base) for record in records)  # noqa: PTH100

    @property
    def _key(self) -> str:
        return os.path.abspath(self.path)  # noqa: PTH100 (Path.absolute keeps `..`)

    def _base(self) -> str:
        return os.path.join(os.path.abspath(self.path.parent), "")  # noqa: PTH100, PTH118

    def _notes(self) -> dict[str, str]:
        if not self._note.exists():
            return {}
        try:
            notes = read_json(self._note)
        except InputError as error:
            logger.warning("%s; existing lists are not overwritten", error)
            return {}
        return notes if isinstance(notes, dict) else {}

    def _digest(self) -> str:
        if not self.path.is_file():
            return ""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def _text(self, splits: LabelledSplits, records: Sequence[ImageRecord]) -> tuple[str, int]:
        base = self._base()
        cameras = camera_texts(records)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", "pid", "camid", "split"))
        lost = 0
        for split in ("train", "query", "gallery"):
            for image in getattr(splits, split):
                path = os.path.abspath(records[image].path)  # noqa: PTH100
                try:
                    path.encode("utf-8")
                except UnicodeEncodeError:
                    lost += split != "query"  # these are in the gallery too
                    continue
                writer.writerow(
                    (path.removeprefix(base), int(splits.pid[image]), cameras[image], split)
                )
        return text.getvalue(), lost


def camera_texts(records: Sequence[ImageRecord]) -> list[str]:
    """The `camid` column of a list: names, or numbers if all names are numbers.

    A model recognises its cameras by these names. If several sets were joined, the name of the set
    precedes that of the camera.
    """
    joined = any(record.source for record in records)
    names = [
        f"{record.source} {camera_name(record)}" if joined else camera_name(record)
        for record in records
    ]
    known = [record.camid != UNKNOWN_CAMERA for record in records]
    if all(name.isdigit() for name, there in zip(names, known, strict=True) if there):
        names = [str(record.camid) for record in records]
    return [name if there else "" for name, there in zip(names, known, strict=True)]


def _queries(images: Sequence[int], records: Sequence[ImageRecord]) -> list[int]:
    """One image of each camera, where there are two cameras; one, where all are unknown."""
    by_camera: dict[int, list[int]] = {}
    for image in images:
        by_camera.setdefault(records[image].camid, []).append(image)
    known = [camid for camid in by_camera if camid != UNKNOWN_CAMERA]
    if len(known) < 2 and UNKNOWN_CAMERA not in by_camera:
        return []
    chosen = known if known else [UNKNOWN_CAMERA]
    return [min(by_camera[c], key=lambda image: _hash(records[image].path)) for c in sorted(chosen)]


def _hash(path: str) -> int:
    """A number below `_PARTS` that any machine gives an image of this name."""
    name = "/".join(Path(path).parts[-3:])
    return int.from_bytes(
        hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big"
    )
