"""Reads files within bounds, writes them whole or not at all, and prints any text safely."""

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
"""The largest text that is read, in bytes: a list of some million images fits."""
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.part")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Characters that move a terminal's cursor, clear it or reverse its text; not tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # Windows has none, nor pipes among its files
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
        InputError: The file does not exist, is not a regular file, or may not be read.
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
        what: What the file should be, for messages: picture, text.

    Raises:
        InputError: The file does not exist, is not a regular file, is too large, or memory or the
            disk fails.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise InputError(f"{path}: {size:,} bytes are too many for a {what}, at most {most:,}")
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
            raise InputError(f"{path}: memory is too small for its {size:,} bytes") from error
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
        errors: Python's handler for bytes that are not UTF-8: `strict` refuses them,
            `surrogateescape` passes them on.

    Raises:
        InputError: The file does not exist, is not a regular file, is too large, or is not UTF-8
            text. The message names the file, and the line if there is one to blame.
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
    """The content of a JSON file.

    Raises:
        InputError: As in `read_text`; or the file is not JSON, or is nested too deeply.
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
    """Yields a temporary path to write to; at the end that file replaces `path`.

    A missing folder is made. After an error `path` is as it was, and the temporary file is gone;
    a killed process may leave one behind (see `remove_leftovers`). Once the block has ended, the
    new file survives a power cut.

    If `path` is a link, the file behind the link is replaced. A pipe or a character device
    (`/dev/null`, `/dev/stdout`) is not replaced: it gets a copy of the temporary file at the end.

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
            # mkstemp gives access to the owner alone; a plain open would obey the umask
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
    """Writes a UTF-8 text file; surrogate escapes (of odd file names) become their bytes again.

    Raises:
        OutputError: The file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", errors="surrogateescape")


def open_to_append(path: Path, errors: str = "strict") -> TextIO:
    """Opens a regular file, or a link to one, to append UTF-8 text.

    The file is made if it does not exist.

    Raises:
        OutputError: The file is not a regular file, or cannot be written.
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
    """Makes stdout escape characters that its encoding lacks, as stderr does, not fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    r"""Text that is safe in a terminal: control characters are escaped.

    Names of files and tensors come from strangers: printed raw, they could clear the screen or
    reverse its text. Tabs and line feeds stay.

    >>> printable("\x1b[2J.jpg")
    '\\x1b[2J.jpg'
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def readable_name(name: str) -> str:
    r"""A name in one line that every encoding has, for tables and JSON.

    Names of files may hold line feeds, and bytes that are no text: these are written out.

    >>> readable_name("door\n\udcff")
    'door\\n\\xff'
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


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
    """Prints a line to stdout, made `printable`."""
    sys.stdout.write(printable(text) + "\n")


def _kind(mode: int) -> str:
    return next((word for test, word in _KINDS if test(mode)), "not a regular file")


def _mode(path: Path) -> int | None:
    """The mode of the file at `path`, or of a link's target; None: nothing is there."""
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
    """The pipe or device at `path`, opened to write; None: a regular file, or nothing.

    Raises:
        OutputError: `path` is a folder, a socket or a disk, or a pipe that nobody reads.
        OSError: The system refuses for another reason.
    """
    number = _descriptor_number(path)
    if number is not None:  # the shell opened this file: go on at its position
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
    """Yields a temporary path to write to, and at the end copies that file to the stream."""
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
