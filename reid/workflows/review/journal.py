"""The answers of a review on disk: one line each, written before the next question is shown."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reid.files import MOST_TEXT, OutputError, read_bytes, writing
from reid.structures import DataError

logger = logging.getLogger(__name__)

JOURNAL = "answers.jsonl"
_VERSION = 1
_HEADER = {"review_answers": _VERSION}


@dataclass(frozen=True)
class Answer:
    """What a person said to a question.

    Attributes:
        number: From 1, in the order of the answers; undone ones keep theirs.
        kind: Of the question.
        verdict: The key that was pressed, as a word.
        images: Paths of the images that were shown. All other numbers are places in it.
        asked: Images that the question was about; the others were known or stood for clusters.
        marked: Images that were marked.
        same: Groups of images of one person each.
        different: Pairs of images of two persons.
        junk: Images that show no person, or no usable one.
        model: Whose features chose the question; see `Source.fingerprint`.
    """

    number: int
    kind: str
    verdict: str
    images: tuple[str, ...]
    asked: tuple[int, ...] = ()
    marked: tuple[int, ...] = ()
    same: tuple[tuple[int, ...], ...] = ()
    different: tuple[tuple[int, int], ...] = ()
    junk: tuple[int, ...] = ()
    model: str = ""

    def line(self) -> str:
        """As JSON in one line."""
        return json.dumps(vars(self), ensure_ascii=True)

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Answer:
        """The answer that a line holds.

        Raises:
            ValueError: It is none.
        """
        try:
            images = tuple(content["images"])
            same = tuple(tuple(group) for group in content["same"])
            different = tuple((int(one), int(other)) for one, other in content["different"])
            lists = {name: tuple(content[name]) for name in ("asked", "marked", "junk")}
            number, texts = content["number"], [content[k] for k in ("kind", "verdict", "model")]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"is no answer ({error!r})") from error
        places = [*(p for group in same for p in group), *(p for pair in different for p in pair)]
        places += [place for numbers in lists.values() for place in numbers]
        if not all(type(place) is int and 0 <= place < len(images) for place in places):
            raise ValueError("is no answer (a number of an image is out of its range)")
        if type(number) is not int or not all(isinstance(t, str) for t in (*texts, *images)):
            raise ValueError("is no answer (a value is of a wrong type)")
        kind, verdict, model = texts
        return cls(
            number, kind, verdict, images,
            same=same, different=different, model=model, **lists,
        )  # fmt: skip


class Journal:
    """A file of answers that only grows; each line is on disk when `append` returns.

    Args:
        folder: Of the review, locked by this process; the file is made in it.

    Attributes:
        answers: Those that count, oldest first; undone ones are not among them.
        path: The file.

    Raises:
        DataError: The file is of something else, or a line before the last is broken.
        OutputError: It cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.answers: list[Answer] = []
        self._last = 0
        with writing(self.path):
            self._file = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600
            )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def append(self, answer: Answer) -> None:
        """Adds an answer.

        Raises:
            OutputError: It could not be written, and does not count.
        """
        self._write(answer.line())
        self.answers.append(answer)
        self._last = answer.number

    def undo(self) -> Answer | None:
        """Takes the last answer back and returns it; None: there is none.

        Raises:
            OutputError: This could not be written, and the answer counts.
        """
        if not self.answers:
            return None
        self._write(json.dumps({"undo": self.answers[-1].number}))
        return self.answers.pop()

    @property
    def next_number(self) -> int:
        """Of the next answer."""
        return self._last + 1

    def close(self) -> None:
        """Lets the file go."""
        os.close(self._file)

    def _write(self, line: str) -> None:
        size = os.fstat(self._file).st_size
        data = line.encode("ascii") + b"\n"
        with writing(self.path):
            try:
                while data:
                    data = data[os.write(self._file, data) :]
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)  # no half a line before the next one
                raise

    def _read(self) -> None:
        data = bytes(read_bytes(self.path, MOST_TEXT, "review's answers"))
        header = json.dumps(_HEADER).encode() + b"\n"
        if not data.startswith(header) and not header.startswith(data):
            raise DataError(
                f"{self.path}: does not begin as the answers of a review of this version "
                f"({json.dumps(_HEADER)}); move it away, or take another --folder"
            )
        lines = data.split(b"\n")
        torn = lines.pop()  # empty where the last line is whole
        if lines and not torn and not _is_json(lines[-1]):
            torn = lines.pop() + b"\n"
        if torn:
            logger.warning(
                "%s: dropped the last line, which is cut off, perhaps by a power cut (%d bytes)",
                self.path,
                len(torn),
            )
            with writing(self.path):
                os.ftruncate(self._file, len(data) - len(torn))
                os.fsync(self._file)
        if not lines:
            self._write(json.dumps(_HEADER))
            _flush_folder(self.path.parent)
            return
        for place, line in enumerate(lines[1:], 2):
            self._take(_parse(line, self.path, place), place)

    def _take(self, content: dict[str, Any], place: int) -> None:
        if "undo" in content:
            if not self.answers or self.answers[-1].number != content["undo"]:
                raise DataError(
                    f"{self.path}, line {place}: takes back answer {content['undo']!r}, which is "
                    "not the last one; put the file back from a copy"
                )
            self.answers.pop()
            return
        try:
            answer = Answer.parse(content)
            if answer.number <= self._last:
                raise ValueError(f"has number {answer.number} after {self._last}")
        except ValueError as error:
            raise DataError(
                f"{self.path}, line {place}: {error}; remove the line, or put the file back from "
                "a copy"
            ) from error
        self.answers.append(answer)
        self._last = answer.number


def places_of(paths: Sequence[str]) -> dict[str, int]:
    """Absolute path -> number of the image; a path that is listed twice counts once."""
    places: dict[str, int] = {}
    for place, path in enumerate(paths):
        places.setdefault(os.path.abspath(path), place)  # noqa: PTH100 (many, and no Path)
    return places


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(line: bytes, path: Path, place: int) -> dict[str, Any]:
    if not _is_json(line):
        raise DataError(
            f"{path}, line {place}: is no JSON object; remove the line, or put the file back from "
            "a copy"
        )
    content: dict[str, Any] = json.loads(line)
    return content


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush a folder
        raise OutputError(f"{folder}: cannot be flushed to disk ({error.strerror})") from error
    finally:
        os.close(descriptor)
