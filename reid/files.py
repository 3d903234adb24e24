"""Files that are written whole or not at all, and a console that takes every name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.part")


class OutputError(OSError):
    """A file cannot be written: says which, why, and what to do."""


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

    Raises:
        OutputError: The file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            _flush_to_disk(temporary)
            # mkstemp gives only the owner access; the file gets what a plain open would give
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
            _flush_to_disk(path.parent)


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


def escape_output() -> None:
    """Has stdout escape what its encoding lacks, as stderr does, and not stop with an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
