"""Files that are read within bounds and written whole or not at all; a console that takes all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

MOST_TEXT = 2**28
"""Bytes of the largest text that is read: a list of some million images."""
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.part")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# What moves a terminal's cursor, clears it or turns its text around, but for tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # Windows has no pipes among its files
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:self|thread-self|\d+))/fd/(\d+)")
_MOST_LINKS = 40
_BLOCK_BYTES = 2**20


class InputError(OSError):
    """A file cannot be read: says which, why, and what to do."""


class OutputError(OSError):
    """A file cannot be written: says which, why, and what to do."""


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file, or a link to one, to read its bytes.

    Never waits, as opening a pipe would, and never opens a device.

    Raises:
        InputError: There is no such file, it is no regular one, or it may not be read.
    """
    try:
        _check_regular(path, os.stat(path).st_mode)  # noqa: PTH116  (a Path takes twice the time)
        file = open(path, "rb", buffering=0, opener=_open_without_waiting)  # noqa: SIM115
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from error
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return cast(BinaryIO, file)


def read_bytes(path: str | Path, most: int, what: str = "file") -> bytearray:
    """The bytes of a regular file.

    Args:
        path: The file, or a link to it.
        most: Of bytes; a larger file is not read.
        what: It should be, for messages: picture, text.

    Raises:
        InputError: There is no such file, it is no regular one, has more bytes, or memory or the
            disk fails.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise InputError(f"{path}: {size:,} bytes are too many for a {what}, {most:,} the most")
        try:
            data = bytearray(size)
            view, done = memoryview(data), 0
            while done < size and (read := file.readinto(view[done:])):  # type: ignore[attr-defined]
                done += read
            del view
            del data[done:]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        except MemoryError as error:
            raise InputError(f"{path}: memory does not suffice for its {size:,} bytes") from error
    return data


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a regular file's bytes, as a hexadecimal number.

    Raises:
        InputError: There is no such file, it is no regular one, or it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        try:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def read_text(path: str | Path, most: int = MOST_TEXT, errors: str = "strict") -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark; line ends stay.

    Args:
        path: The file, or a link to it.
        most: Of bytes; a larger file is not read.
        errors: Python's word for what becomes of bytes that are not UTF-8: `strict` refuses them,
            `surrogateescape` passes them on.

    Raises:
        InputError: There is no such file, it is no regular one, is larger, or is no such text;
            names the file, and the line where one is to blame.
    """
    data = read_bytes(path, most, "text")
    if data[:2] in _UTF16:
        raise InputError(f"{path}: is not UTF-8 text but UTF-16; save it as UTF-8")
    if (place := data.find(0)) >= 0:
        line = data.count(b"\n", 0, place) + 1
        raise InputError(f"{path}: has a NUL byte in line {line}, which no text has")
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: is not UTF-8 text (byte 0x{data[error.start]:02x} in line {line}); save it "
            "as UTF-8"
        ) from error


def read_json(path: str | Path, most: int = MOST_TEXT) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: See `read_text`; or it is not JSON, or lists in lists lie too deep.
    """
    try:
        return json.loads(read_text(path, most))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's errors in its block into an `OutputError` that names `path`.

    Raises:
        OutputError: In place of any other OSError: disk full, no right to write, and so on.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); files written before are "
            "whole; free space, or choose an output folder that can be written to"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to, which then takes the place of `path`.

    The folder is made. After an error `path` is as it was, and the temporary file is gone; after
    the death of the process it may be left (`remove_leftovers`). Once this has ended, not even a
    power cut takes the new file away.

    A link stays, and what it leads to is replaced. A pipe or a character device (`/dev/null`,
    `/dev/stdout`) stays too, and gets what was written to the temporary file in the end.

    Raises:
        OutputError: The file cannot be written, or is a folder, a socket or a disk.
    """
    with writing(path):
        stream = _open_stream(path)
        if stream is not None:
            with stream, _passed_on(stream) as temporary:
                yield temporary
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(".part", f".{target.name}.", target.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            _flush_to_disk(temporary)
            # mkstemp gives only the owner access; the file gets what a plain open would give
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
            _flush_to_disk(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files that `replacing` left in a folder when its process was killed."""
    for path in folder.glob(".*.part"):
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8; bytes of a file's name that are none stay what they are.

    Raises:
        OutputError: The file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", errors="surrogateescape")


def open_to_append(path: Path, errors: str = "strict") -> TextIO:
    """Opens a regular file, or a link to one, to write UTF-8 text behind what it holds.

    The file is made where there is none.

    Raises:
        OutputError: It is no regular file, or cannot be written.
    """
    with writing(path):
        mode = _mode(path)
        if mode is None or stat.S_ISREG(mode):
            file = open(  # noqa: SIM115
                path, "a", encoding="utf-8", errors=errors, opener=_open_without_waiting
            )
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
        raise OutputError(f"{path}: is {_kind(mode)}, expected a regular file; remove it")


def escape_output() -> None:
    """Has stdout escape what its encoding lacks, as stderr does, and not stop with an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    r"""Text that a terminal shows and does not obey: control characters are escaped.

    Names of files and tensors come from others: they may clear a screen or turn its text around.
    Tabs and line feeds stay.

    >>> printable("\x1b[2J.jpg")
    '\\x1b[2J.jpg'
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def near(path: str | Path) -> str:
    """A path as a person would type it: relative where it lies below the working folder.

    >>> near("/nowhere/a.jpg")
    '/nowhere/a.jpg'
    """
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):  # elsewhere; or the working folder is gone
        return str(path)


def say(text: str) -> None:
    """Writes a line of a tool's own to stdout, made `printable`."""
    sys.stdout.write(printable(text) + "\n")


def _kind(mode: int) -> str:
    return next((word for test, word in _KINDS if test(mode)), "no regular file")


def _mode(path: Path) -> int | None:
    """What `path` or the link's target is, as the system says; None: nothing is there."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _check_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is {_kind(mode)}, expected a regular file")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_WAIT, 0o666)


def _open_stream(path: Path) -> BinaryIO | None:
    """What takes bytes at `path` and cannot be replaced, open to write; None: a regular file.

    Raises:
        OutputError: Something stands there that is neither.
        OSError: Nobody reads the pipe, or the system refuses otherwise.
    """
    number = _descriptor_number(path)
    if number is not None:  # a file that the shell has opened has a place to go on from
        sys.stdout.flush()
        sys.stderr.flush()
        return os.fdopen(os.dup(number), "wb")
    mode = _mode(path)
    if mode is None or stat.S_ISREG(mode):
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise OutputError(f"{path}: is {_kind(mode)}, expected the name of a file")
    try:
        descriptor = os.open(path, os.O_WRONLY | _NO_WAIT)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OutputError(f"{path}: is a pipe that nobody reads") from error
        raise
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb")


def _descriptor_number(path: Path) -> int | None:
    """The number of the open file that a name such as `/dev/stdout` stands for."""
    name = os.path.abspath(path)  # noqa: PTH100  (Path.absolute keeps `..`)
    for _ in range(_MOST_LINKS):
        match = _DESCRIPTOR.fullmatch(name)
        if match:
            return int(match[1])
        if not os.path.islink(name):  # noqa: PTH114
            return None
        name = os.path.normpath(Path(name).parent / os.readlink(name))  # noqa: PTH115
    return None


@contextmanager
def _passed_on(stream: BinaryIO) -> Iterator[Path]:
    """Yields a temporary name to write to; the stream gets what was written."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "output"
        temporary.touch()
        yield temporary
        with temporary.open("rb") as written:
            shutil.copyfileobj(written, stream)
        stream.flush()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
