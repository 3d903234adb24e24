"""Anybody's images, listed in a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from reid.data.datasets.base import ReIDDataset, Split, check_files, join_below, not_empty
from reid.registry import DATASET
from reid.structures import UNKNOWN_CAMERA, UNLABELLED, DataError, ImageRecord

_LAYOUT = "a CSV file with the header path,pid,camid,split (only path is needed)"


@DATASET.register()
class CSV(ReIDDataset):
    """A CSV file with the header `path,pid,camid,split`.

    `path` is relative to the file's own folder. An empty `pid` is an unlabelled image, an empty
    `camid` an unknown camera; `camid` counts from 0. `split` is `train`, `query` or `gallery`.
    Columns but `path` may be left out: all images are then unlabelled, of unknown cameras, or for
    training. A file without queries can be trained on, but not tested on.

    Args:
        path: The CSV file, below the root.
        train_split: The split to train on; another name than `train` trains on other images of
            the same file.
        root: Folder of all datasets; empty: `$REID_DATASETS`, or else `datasets/`.
    """

    def __init__(self, path: str, train_split: str = "train", root: str = "") -> None:
        super().__init__(root)
        self.file = self.root / path
        self.name = Path(path).stem if Path(path).parent == Path() else Path(path).parent.name
        self._train_split = train_split

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
        return records

    def has_test(self) -> bool:
        """Whether the file lists queries and a gallery."""
        return {"query", "gallery"} <= {name for name, _ in self._read()}

    def _read(self) -> list[tuple[str, ImageRecord]]:
        self.find_folder((str(self.file.parent.absolute()),), _LAYOUT)
        return read_csv(self.file, self._train_split)


def read_csv(file: Path, train_split: str = "train") -> list[tuple[str, ImageRecord]]:
    """The split and the record of each line.

    Args:
        file: With the header `path,pid,camid,split`; see `CSV`.
        train_split: Another name of a split, besides `train`, `query` and `gallery`.

    Raises:
        DataError: The file is missing or empty, or a line is wrong.
    """
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; expected {_LAYOUT}")
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text; expected {_LAYOUT}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = reader.fieldnames or []
    strange = set(columns) - {"path", "pid", "camid", "split"}
    if "path" not in columns or strange:
        raise DataError(
            f"{file}: the header is {','.join(columns) or 'missing'}; expected {_LAYOUT}"
        )
    splits = ("train", "query", "gallery", train_split)
    rows = [_read_row(row, file, reader.line_num, splits) for row in reader]
    not_empty([record for _, record in rows], file, _LAYOUT)
    return rows


def _read_row(
    row: Mapping[str | None, str | None], file: Path, line: int, splits: Sequence[str]
) -> tuple[str, ImageRecord]:
    where = f"{file}, line {line}"
    path = row["path"]
    if None in row or not path or None in row.values():
        raise DataError(f"{where}: has more or fewer fields than the header, or no path")
    split = row.get("split") or "train"
    if split not in splits:
        raise DataError(f"{where}: split {split!r}; expected train, query or gallery")
    pid = _number(row.get("pid"), UNLABELLED, f"{where}: pid")
    camid = _number(row.get("camid"), UNKNOWN_CAMERA, f"{where}: camid")
    return split, ImageRecord(str(join_below(file.parent, path, where)), pid, camid)


def _number(text: str | None, empty: int, where: str) -> int:
    text = (text or "").strip()
    if not text:
        return empty
    if text != "-1" and not (text.isascii() and text.isdigit()):
        raise DataError(f"{where} is {text!r}; expected a whole number from 0, -1, or nothing")
    return int(text)
