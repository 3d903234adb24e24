"""Anybody's images, listed in a CSV file."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from reid.data.datasets.base import (
    ReIDDataset,
    Split,
    check_files,
    check_spelling,
    join_below,
    not_empty,
)
from reid.registry import DATASET
from reid.structures import UNKNOWN_CAMERA, UNLABELLED, DataError, ImageRecord

logger = logging.getLogger(__name__)

_COLUMNS = ("path", "pid", "camid", "split")
_DIGITS = 18  # of a 64-bit number
_LAYOUT = "a CSV file with the header path,pid,camid,split (only path is needed)"


@DATASET.register()
class CSV(ReIDDataset):
    """A CSV file with the header `path,pid,camid,split`, and any columns more.

    UTF-8, with or without a byte order mark, any line ends, fields in double quotes where needed;
    separated by commas, or by semicolons or tabs if the header has no comma. `path` is relative
    to the file's own folder, or absolute and below it. An empty `pid` is an unlabelled image, an
    empty `camid` an unknown camera; `camid` counts from 0. `split` is `train`, `query` or
    `gallery`. Columns but `path` may be left out: all images are then unlabelled, of unknown
    cameras, or for training. Further columns are kept as they stand, in `ImageRecord.extra`. A file
    without queries can be trained on, but not tested on.

    Args:
        path: The CSV file, below the root.
        train_split: The split to train on; another name than `train` trains on other images of
            the same file.
        allow_outside: Takes paths that lead out of the file's folder, too.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    def __init__(
        self,
        path: str,
        train_split: str = "train",
        allow_outside: bool = False,
        root: str = "",
    ) -> None:
        super().__init__(root)
        self._allow_outside = allow_outside
        self._rows: list[tuple[str, ImageRecord]] | None = None
        self.file = self.root / path
        self.name = Path(path).stem if Path(path).parent == Path() else Path(path).parent.name
        self._train_split = train_split

    @property
    def site(self) -> str:
        """The folder of the file."""
        return str(self.file.parent.resolve())

    def load(self, split: Split) -> list[ImageRecord]:
        """Images of a split, in the order of the file."""
        wanted = self._train_split if split == "train" else split
        rows = self._read()
        records = [record for name, record in rows if name == wanted]
        if not records:
            present = sorted({name for name, _ in rows}) or ["none"]
            raise DataError(
                f"{self.file}: no image of the split {wanted!r}; splits in the file: "
                f"{', '.join(present)}"
            )
        check_files(records, self.file)
        if records[0].extra:
            logger.info("%s: further columns kept: %s", self.file, ", ".join(records[0].extra))
        return records

    def has_train(self) -> bool:
        """Whether the file lists an image of `train_split`."""
        return any(name == self._train_split for name, _ in self._read())

    def has_test(self) -> bool:
        """Whether the file lists queries and a gallery."""
        return {"query", "gallery"} <= {name for name, _ in self._read()}

    def _read(self) -> list[tuple[str, ImageRecord]]:
        """The lines of the file; read once."""
        if self._rows is None:
            self.find_folder((str(self.file.parent.absolute()),), _LAYOUT)
            self._rows = read_csv(self.file, self._train_split, allow_outside=self._allow_outside)
        return self._rows


def read_csv(
    file: Path, train_split: str = "train", *, allow_outside: bool = False
) -> list[tuple[str, ImageRecord]]:
    """The split and the record of each line.

    Args:
        file: With the header `path,pid,camid,split`; see `CSV`.
        train_split: Another name of a split, besides `train`, `query` and `gallery`.
        allow_outside: Takes paths that lead out of the file's folder, too.

    Raises:
        DataError: The file is missing or empty, or a line is wrong.
    """
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; expected {_LAYOUT}")
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text; expected {_LAYOUT}") from error
    header = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    splits = ("train", "query", "gallery", train_split)
    try:
        columns = list(reader.fieldnames or [])
        _check_header(columns, file)
        rows = [
            _read_row(row, file, f"{file}, line {reader.line_num}", splits, allow_outside)
            for row in reader
        ]
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.reader.line_num}: is not CSV ({error})") from error
    not_empty([record for _, record in rows], file, _LAYOUT)
    return rows


def _check_header(columns: Sequence[str], file: Path) -> None:
    where = f"{file}: the header is {','.join(columns) or 'missing'}"
    if "path" not in columns:
        raise DataError(f"{where}; expected {_LAYOUT}")
    if "" in columns or len(set(columns)) < len(columns):
        raise DataError(f"{where}; expected a name for each column, and each once")
    try:
        check_spelling(columns, _COLUMNS)
    except ValueError as error:
        raise DataError(f"{where}; column {error}") from error


def _read_row(
    row: Mapping[str | None, str | None],
    file: Path,
    where: str,
    splits: Sequence[str],
    allow_outside: bool,
) -> tuple[str, ImageRecord]:
    path = row["path"]
    if None in row or not path or None in row.values():
        raise DataError(f"{where}: has more or fewer fields than the header, or no path")
    try:
        place = join_below(file.parent, path, where, allow_outside=allow_outside)
    except DataError as error:
        raise DataError(f"{error}; ALLOW_OUTSIDE: true takes it all the same") from None
    split = row.get("split") or "train"
    if split not in splits:
        raise DataError(f"{where}: split {split!r}; expected train, query or gallery")
    pid = _number(row.get("pid"), UNLABELLED, f"{where}: pid")
    camid = _number(row.get("camid"), UNKNOWN_CAMERA, f"{where}: camid")
    extra = {str(name): text or "" for name, text in row.items() if name not in _COLUMNS}
    return split, ImageRecord(str(place), pid, camid, extra=extra)


def _number(text: str | None, empty: int, where: str) -> int:
    text = (text or "").strip()
    if not text:
        return empty
    if text != "-1" and not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise DataError(
            f"{where} is {text!r}; expected a whole number from 0 of at most {_DIGITS} digits, -1, "
            "or nothing"
        )
    return int(text)
