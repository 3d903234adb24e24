"""Anybody's images, listed in a CSV file."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reid.data.datasets.base import (
    ReIDDataset,
    Split,
    backslash_hint,
    check_files,
    check_spelling,
    join_below,
    list_numbers,
    not_empty,
)
from reid.data.scan import natural_key
from reid.files import InputError, read_text
from reid.registry import DATASET
from reid.structures import (
    UNKNOWN_CAMERA,
    UNLABELLED,
    VIEW,
    DataError,
    ImageRecord,
)

logger = logging.getLogger(__name__)

_COLUMNS = ("path", "pid", "camid", "split")
_FRAME = "frame"
_DIGITS = 18  # of a 64-bit number
_LONGEST_NAME = 255
_LAYOUT = "a CSV file with the header path,pid,camid,split (only path is needed)"
_NUMBER = re.compile(r"[+-]?[\d.,]*\d[\d.,]*(?:[eE][+-]?\d+)?")  # looks like a number
_WHOLE = re.compile(rf"(-1|[0-9]{{1,{_DIGITS}}})(?:\.0*)?")
_MISSING = ("nan", "<na>", "none", "null", "n/a")  # as pandas and databases write it


@DATASET.register()
class CSV(ReIDDataset):
    """A CSV file with the header `path,pid,camid,split` and any further columns.

    UTF-8, with or without a byte order mark, any line ends, fields in double quotes where needed;
    separated by commas, or by semicolons or tabs if the header has no comma. `path` is relative
    to the file's own folder, or absolute and below it. An empty `pid` is an unlabelled image, an
    empty `camid` an unknown camera; `camid` counts from 0. Both may be whole numbers, as floats
    too (`104.0`, as pandas writes a column with gaps), or names: if any of a column is a name, all
    of it are numbered from 0 in natural order, `cam2` before `cam10`, and the log says which is
    which. `split` is `train`, `query` or `gallery`. An image has one identity, however often it is
    listed. Without the column `pid` all images are unlabelled, without
    `camid` their cameras are unknown, without `split` all are for training. A column `frame` is the
    time of each image inside its camera, a whole number from 0; empty or -1 is unknown. A column
    `view` is the viewpoint, of the same form; it reaches a network as `Batch.side["view"]`, which
    ViT's NUM_VIEWS takes. The text of further columns goes to `ImageRecord.extra`. A file without
    queries can be trained on, but not tested on.

    Args:
        path: The CSV file, below the root.
        train_split: The split to train on; another name than `train` trains on other images of
            the same file.
        allow_outside: Takes paths that lead out of the file's folder, too.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.

    Attributes:
        identities: Number of an identity -> its name, once images are loaded; empty where the
            names are the numbers.
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
        self.identities: dict[int, str] = {}

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
            found = read_list(self.file, self._train_split, allow_outside=self._allow_outside)
            _check_labels(found.rows, self.file)
            self.identities, self.cameras = found.identities, found.cameras
            for what, numbers in (
                ("cameras", enumerate(self.cameras)),
                ("identities", self.identities.items()),
            ):
                if text := list_numbers(numbers):
                    logger.info("%s: %s %s", self.name, what, text)
            self._rows = found.rows
        return self._rows


@dataclass(frozen=True)
class ImageList:
    """The content of a list.

    Attributes:
        rows: Split and record of each line.
        identities: Number of an identity -> its name; empty where the names are the numbers.
        cameras: Names of the cameras in the order of their numbers; empty where these are numbers.
    """

    rows: list[tuple[str, ImageRecord]]
    identities: dict[int, str]
    cameras: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the file; `pid` and `camid` have one form for equal numbers."""

    path: str
    pid: str
    camid: str
    split: str
    frame: int
    extra: dict[str, str | int]


def read_csv(
    file: Path, train_split: str = "train", *, allow_outside: bool = False
) -> list[tuple[str, ImageRecord]]:
    """The split and the record of each line; see `read_list`."""
    return read_list(file, train_split, allow_outside=allow_outside).rows


def read_list(file: Path, train_split: str = "train", *, allow_outside: bool = False) -> ImageList:
    """The images of a list.

    Args:
        file: With the header `path,pid,camid,split`; see `CSV`.
        train_split: A further name that the column `split` may hold.
        allow_outside: Takes paths that lead out of the file's folder, too.

    Raises:
        DataError: The file is missing, is not a regular file, is empty, or a line is wrong.
    """
    try:
        text = read_text(file)
    except InputError as error:
        raise DataError(f"{error}; expected {_LAYOUT}") from error
    header = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    splits = ("train", "query", "gallery", train_split)
    try:
        columns = list(reader.fieldnames or [])
        _check_header(columns, file)
        lines = [
            _read_line(row, file, f"{file}, line {reader.line_num}", splits, allow_outside)
            for row in reader
        ]
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.reader.line_num}: is not CSV ({error})") from error
    pids, identities = _numbers({line.pid for line in lines}, UNLABELLED)
    camids, cameras = _numbers({line.camid for line in lines}, UNKNOWN_CAMERA)
    rows = [
        (
            line.split,
            ImageRecord(
                line.path,
                pids[line.pid],
                camids[line.camid],
                frame=line.frame,
                extra=_extra(line, cameras),
            ),
        )
        for line in lines
    ]
    not_empty([record for _, record in rows], file, _LAYOUT)
    return ImageList(rows, dict(enumerate(identities)), cameras)


def _check_header(columns: Sequence[str], file: Path) -> None:
    where = f"{file}: the header is {','.join(columns) or 'missing'}"
    if "path" not in columns:
        excel = columns and columns[0].lower().startswith("sep=")
        hint = "; remove this line, which is for Excel" if excel else ""
        raise DataError(f"{where}; expected {_LAYOUT}{hint}")
    if "" in columns or len(set(columns)) < len(columns):
        index = "" if columns[0] else "; the first is pandas' index: write with index=False"
        raise DataError(f"{where}; expected a name for each column, and each once{index}")
    try:
        check_spelling(columns, _COLUMNS)
    except ValueError as error:
        raise DataError(f"{where}; column {error}") from error


def _read_line(
    row: Mapping[str | None, str | None],
    file: Path,
    where: str,
    splits: Sequence[str],
    allow_outside: bool,
) -> _Line:
    path = row["path"]
    if None in row or not path or None in row.values():
        raise DataError(f"{where}: has more or fewer fields than the header, or no path")
    try:
        place = join_below(file.parent, path, where, allow_outside=allow_outside)
    except DataError as error:
        hint = backslash_hint(path) or "; ALLOW_OUTSIDE: true takes it all the same"
        raise DataError(f"{error}{hint}") from None
    split = row.get("split") or "train"
    if split not in splits:
        raise DataError(f"{where}: split {split!r}; expected train, query or gallery")
    pid, camid = (_number_or_name(row.get(key), f"{where}: {key}") for key in ("pid", "camid"))
    frame = _whole_number(row.get(_FRAME), f"{where}: {_FRAME}", "time inside its camera")
    known = (*_COLUMNS, _FRAME)
    extra: dict[str, str | int] = {
        str(name): text or "" for name, text in row.items() if name not in known
    }
    if VIEW in row:
        extra[VIEW] = _whole_number(row[VIEW], f"{where}: {VIEW}", "viewpoint")
    return _Line(str(place), pid, camid, split, frame, extra)


def _whole_number(text: str | None, where: str, meaning: str) -> int:
    """A number from 0, or -1 where it is not known."""
    text = (text or "").strip()
    if not text:
        return -1
    whole = _WHOLE.fullmatch(text)
    if whole is None:
        raise DataError(
            f"{where} is {text!r}; expected a whole number from 0 of at most {_DIGITS} digits, the "
            f"image's {meaning}, -1 or nothing; if the column means something else, "
            "give it another name"
        )
    return int(whole[1])


def _number_or_name(text: str | None, where: str) -> str:
    """A whole number without leading zeros and decimals, a name, or an empty text."""
    text = (text or "").strip()
    if whole := _WHOLE.fullmatch(text):
        return str(int(whole[1]))
    if text.lower() in _MISSING:
        raise DataError(f"{where} is {text!r}; leave it empty where it is not known")
    if _NUMBER.fullmatch(text) or text.isdigit():  # ² is a digit too
        raise DataError(
            f"{where} is {text!r}; expected a whole number from 0 of at most {_DIGITS} digits, -1, "
            "a name, or nothing"
        )
    if len(text) > _LONGEST_NAME:
        raise DataError(
            f"{where} has {len(text):,} characters; expected a number or a name of at most "
            f"{_LONGEST_NAME}"
        )
    return text


def _numbers(texts: set[str], empty: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """Text -> number; and the names in the order of their numbers, if the texts are names."""
    given = texts - {"", "-1"}
    known = {"": empty, "-1": -1}
    if all(text.isascii() and text.isdigit() for text in given):
        return {text: int(text) for text in given} | known, ()
    names = tuple(sorted(given, key=natural_key))
    return {name: number for number, name in enumerate(names)} | known, names


def _extra(line: _Line, cameras: Sequence[str]) -> dict[str, str | int]:
    """Further columns, and the camera's name where cameras have names."""
    named = cameras and line.camid not in ("", "-1")
    return {"camera": line.camid, **line.extra} if named else line.extra


def _check_labels(rows: Sequence[tuple[str, ImageRecord]], file: Path) -> None:
    """Checks that no image has two identities; a second line without a label is fine.

    Raises:
        DataError: An image has two.
    """
    pids: dict[str, int] = {}
    for _, record in rows:
        if record.pid == UNLABELLED:
            continue
        known = pids.setdefault(record.path, record.pid)
        if known != record.pid:
            raise DataError(
                f"{file}: lists {record.path} with identity {known} and again with {record.pid}; "
                "an image shows one person: correct the list"
            )
