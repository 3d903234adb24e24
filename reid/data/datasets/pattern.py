"""Anybody's images, with identities and cameras in their paths."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from tabulate import tabulate

from reid.data.datasets.base import (
    ReIDDataset,
    Split,
    check_cameras,
    check_spelling,
    list_numbers,
    no_image,
)
from reid.data.scan import natural_key, scan_images
from reid.registry import DATASET
from reid.structures import UNKNOWN_CAMERA, UNLABELLED, VIEW, DataError, ImageRecord

logger = logging.getLogger(__name__)

_GROUPS = ("pid", "camid", "split")
_NUMBER = re.compile(r"-1|[0-9]{1,9}")
_SHOWN = 5


@DATASET.register()
class Pattern(ReIDDataset):
    r"""Images anywhere below a folder; a regular expression reads identity and camera in paths.

    The expression is searched in each path relative to the folder, with `/` between folders; `^`
    and `$` bind it to the ends. Its named groups are `pid`, `camid` and `split`, all optional:

    - `pid`: whole numbers are used as they are, -1 is junk; if any name is not a number of at most
      9 digits, all names are numbered from 0 in natural order. Empty or left out: unlabelled.
    - `camid`: numbered from 0 in natural order, `cam2` before `cam10`. Empty or left out: unknown.
    - `split`: `train`, `query` or `gallery`, or the words in `splits`; left out: all is `train`.
    - `view`: the viewpoint, a whole number from 0, for a network with vectors of viewpoints.
    - The text of any other group goes to `ImageRecord.extra`, and so does the camera's name, as
      `camera`.

    The log shows examples of what was read. `(?P<pid>\d+)_c(?P<camid>\d+)` reads
    `monday/0002_c1s1_000451.jpg` as identity 2 of the first camera.

    Args:
        path: The folder, below the root.
        pattern: The regular expression, in Python's syntax.
        unmatched: What to do about images that it does not match: `error` stops and names them,
            `skip` passes them over and counts them.
        splits: Split -> the word for it in the group `split`, if that differs from its name.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.

    Attributes:
        identities: Number of an identity -> its name, once images are loaded; empty where the
            names are the numbers.

    Raises:
        ValueError: The expression does not compile, a group seems misspelt, or `splits` does not
            fit.
    """

    def __init__(
        self,
        path: str,
        pattern: str,
        unmatched: Literal["error", "skip"] = "error",
        splits: Mapping[str, str] | None = None,
        root: str = "",
    ) -> None:
        super().__init__(root)
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"pattern: {pattern!r} is no regular expression ({error}); expected one with "
                "groups such as (?P<pid>...) and (?P<camid>...)"
            ) from error
        try:
            check_spelling(self._pattern.groupindex, _GROUPS)
        except ValueError as error:
            raise ValueError(f"pattern: group {error}") from error
        known = get_args(Split)
        if splits is not None and (
            not set(splits) <= set(known) or "split" not in self._pattern.groupindex
        ):
            raise ValueError(
                f"splits: expected train, query, gallery as keys and a group (?P<split>...) in "
                f"pattern, got {dict(splits)} and {pattern!r}"
            )
        words: dict[str, str] = {name: name for name in known} | dict(splits or {})
        self._splits = {word: name for name, word in words.items()}
        if len(self._splits) < len(words):
            raise ValueError(f"splits: expected another word for each split, got {words}")
        self._path = path
        self._unmatched = unmatched
        self.name = Path(path).name or "Pattern"
        self.identities: dict[int, str] = {}
        self._loaded: list[tuple[str, ImageRecord]] | None = None

    @property
    def site(self) -> str:
        """The folder."""
        return str((self.root / self._path).resolve())

    @property
    def scanned_folder(self) -> Path:
        """The folder."""
        return Path(self.site)

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of their paths.

        Raises:
            DataError: The folder is missing or cannot be read, an image does not match, there is
                none of this split, or all pictures of a camera are of kinds that are not read.
        """
        records = [record for name, record in self._all() if name == split]
        if not records:
            present = sorted({name for name, _ in self._all()})
            raise DataError(
                f"{self.root / self._path}: no image of the split {split!r}; PATTERN "
                f"{self._pattern.pattern!r} gives: {', '.join(present)}"
                + (
                    ""
                    if "split" in self._pattern.groupindex
                    else "; it has no group (?P<split>...)"
                )
            )
        return records

    def has_train(self) -> bool:
        """Whether there is an image for training."""
        return any(name == "train" for name, _ in self._all())

    def has_test(self) -> bool:
        """Whether the paths tell queries and a gallery."""
        if "split" not in self._pattern.groupindex:
            return False
        return {"query", "gallery"} <= {name for name, _ in self._all()}

    def _all(self) -> list[tuple[str, ImageRecord]]:
        """Split and record of each image; read once."""
        if self._loaded is None:
            self._loaded = self._read()
        return self._loaded

    def _read(self) -> list[tuple[str, ImageRecord]]:
        layout = f"images that {self._pattern.pattern!r} matches"
        folder = self.find_folder((self._path,), layout)
        scan = scan_images(folder)
        parsed: list[tuple[str, dict[str, str]]] = []
        unmatched = []
        for path in scan.images:
            match = self._pattern.search(path)
            groups = {} if match is None else match.groupdict(default="")
            if match is None or ("split" in groups and groups["split"] not in self._splits):
                unmatched.append(path)
            else:
                parsed.append((path, groups))
        if scan.passed_over():
            logger.warning("%s: passed over %s", folder, scan.passed_over())
        if unmatched and (self._unmatched == "error" or not parsed):
            raise DataError(self._complaint(folder, unmatched, len(scan.images)))
        if not parsed:
            raise DataError(no_image(folder, layout, scan))

        pids, self.identities = _number_identities(groups.get("pid", "") for _, groups in parsed)
        names = {groups.get("camid", "") for _, groups in parsed} - {""}
        check_cameras(scan, names, self._camera, folder)
        self.cameras = tuple(sorted(names, key=natural_key))
        camids = {name: number for number, name in enumerate(self.cameras)} | {"": UNKNOWN_CAMERA}
        records = [
            (
                self._splits[groups["split"]] if "split" in groups else "train",
                ImageRecord(
                    f"{folder}/{path}",
                    pids[groups.get("pid", "")],
                    camids[groups.get("camid", "")],
                    extra=_extra(groups, path),
                ),
            )
            for path, groups in parsed
        ]
        self._log(parsed, records, unmatched)
        return records

    def _camera(self, path: str) -> str | None:
        """The camera in a path; None: the path has none."""
        match = self._pattern.search(path)
        return None if match is None else match.groupdict(default="").get("camid") or None

    def _complaint(self, folder: Path, unmatched: list[str], count: int) -> str:
        reason = (
            f" or name no split of {', '.join(self._splits)}"
            if "split" in self._pattern.groupindex
            else ""
        )
        return (
            f"{folder}: {len(unmatched):,} of {count:,} images do not match PATTERN "
            f"{self._pattern.pattern!r}{reason}, the first are "
            f"{', '.join(map(repr, unmatched[:_SHOWN]))}; change PATTERN"
            + (", or set UNMATCHED: skip to go without them" if len(unmatched) < count else "")
        )

    def _log(
        self,
        parsed: list[tuple[str, dict[str, str]]],
        records: list[tuple[str, ImageRecord]],
        unmatched: list[str],
    ) -> None:
        """Logs a preview: images spread over the whole set, and those that did not match."""
        shown = sorted({place * (len(parsed) - 1) // max(_SHOWN - 1, 1) for place in range(_SHOWN)})
        rows = [
            (repr(parsed[row][0]), records[row][1].pid, records[row][1].camid, records[row][0])
            for row in shown
        ]
        logger.info(
            "%s: PATTERN matches %s of %s images, for example\n%s\ncameras: %s%s",
            self.name,
            f"{len(parsed):,}",
            f"{len(parsed) + len(unmatched):,}",
            tabulate(rows, headers=["path", "pid", "camid", "split"]),
            list_numbers(enumerate(self.cameras)) or "unknown",
            f"\nidentities: {list_numbers(self.identities.items())}" if self.identities else "",
        )
        if unmatched:
            logger.warning(
                "%s: passed over %s images that do not match PATTERN, the first are %s",
                self.name,
                f"{len(unmatched):,}",
                ", ".join(map(repr, unmatched[:_SHOWN])),
            )


def _extra(groups: Mapping[str, str], path: str) -> dict[str, str | int]:
    own: dict[str, str | int] = {key: text for key, text in groups.items() if key not in _GROUPS}
    if VIEW in groups:
        text = groups[VIEW] or "-1"
        if not re.fullmatch(r"-1|[0-9]{1,9}", text):
            raise DataError(
                f"{path}: the group {VIEW} is {text!r}; expected a viewpoint, a whole number from "
                "0, -1 or nothing; if the group means something else, give it another name"
            )
        own[VIEW] = int(text)
    return {"camera": groups["camid"], **own} if groups.get("camid") else own


def _number_identities(names: Iterable[str]) -> tuple[dict[str, int], dict[int, str]]:
    """Name -> number; and number -> name, unless the names are numbers themselves."""
    given = set(names) - {""}
    if all(_NUMBER.fullmatch(name) for name in given):
        return {name: int(name) for name in given} | {"": UNLABELLED}, {}
    by_number = dict(enumerate(sorted(given - {"-1"}, key=natural_key)))
    numbers = {name: number for number, name in by_number.items()}
    return numbers | {"": UNLABELLED, "-1": UNLABELLED}, by_number
