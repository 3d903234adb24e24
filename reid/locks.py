"""A folder that one run at a time may write to."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reid.files import writing

LOCK = "run.lock"


class FolderInUse(RuntimeError):  # noqa: N818  (what it says, not what went wrong)
    """Another process writes to the folder; says which."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the system frees it however the process ends.

    The folder is made if it is not there. Its file `run.lock` names the holder, and is removed
    at the end. A file that a killed process left behind locks nothing.

    Raises:
        FolderInUse: Another process holds it.
        OutputError: The folder cannot be written to.
    """
    path = folder / LOCK
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(path):
        descriptor = _acquire(path)
    try:
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor of the file at `path`, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise FolderInUse(
                f"{path.parent} is in use by {holder or 'another process'}; wait for it to end, "
                "stop it, or choose another folder"
            ) from None
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # its holder has just removed it
