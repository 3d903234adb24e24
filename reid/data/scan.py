"""Images below a folder, found fast, and again without reading a large tree anew."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reid.files import write_text
from reid.structures import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp"))
CACHED_FROM = 10_000  # files; a smaller tree is read in some ten milliseconds
_FORMAT = 1
_SETTLED = 2_000_000_000  # ns; file systems tell times apart that lie further apart than this


@dataclass
class Scan:
    """What lies below a folder.

    Attributes:
        images: Paths relative to the folder, with `/`, in the order of their names.
        hidden: Files and folders whose name starts with a dot; not looked into.
        others: Files that are no images by their suffix.
        dangling: Symbolic links that lead nowhere.
        repeated: Symbolic links to folders that had been read already, such as a parent.
    """

    images: list[str] = field(default_factory=list)
    hidden: int = 0
    others: int = 0
    dangling: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)

    def passed_over(self) -> str:
        """What was passed over, in words; empty if nothing was."""
        parts = [
            f"{what}: {count:,}"
            for count, what in (
                (self.others, "files that are no images"),
                (self.hidden, "hidden files or folders"),
                (len(self.dangling), "links that lead nowhere"),
                (len(self.repeated), "links to folders that are read already"),
            )
            if count
        ]
        first = [*self.dangling, *self.repeated][:3]
        return ", ".join(parts) + (f" ({', '.join(map(repr, first))})" if first else "")


@dataclass
class _Folder:
    """One folder's own entries, sorted by name."""

    stamp: list[int]
    images: list[str]
    folders: list[str]
    links: list[str]  # to folders
    dangling: list[str]
    hidden: int
    others: int


def scan_images(folder: Path) -> Scan:
    """All images below a folder.

    Links to files and folders are followed. Each folder is read once: in its own place if it lies
    below `folder`, else under the first link to it; so links in a circle come to an end.

    A tree of `CACHED_FROM` images or more is remembered in `$XDG_CACHE_HOME/reid` or
    `~/.cache/reid`. A folder that has not changed since, by its times and its inode, is not read
    again; one with links in it always is, since a link's target may come and go unseen.

    Raises:
        DataError: `folder` is missing, or a folder cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    cache = _cache_file(folder)
    known = _read_cache(cache) if cache is not None else {}
    found: dict[str, _Folder] = {}
    scan = _walk(folder, known, found)
    if cache is not None and len(scan.images) >= CACHED_FROM and found != known:
        _write_cache(cache, found)
    return scan


def _cache_file(folder: Path) -> Path | None:
    """In `$XDG_CACHE_HOME/reid`, or else in `~/.cache/reid`; None for a user without a home."""
    name = f"scan-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()}.json"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "reid", name)
    except RuntimeError:
        return None


def natural_key(text: str) -> tuple[list[str | int], str]:
    """A key that sorts as people do: numbers by their value, capitals among the small letters.

    >>> sorted(["cam10", "Cam2", "cam1"], key=natural_key)
    ['cam1', 'Cam2', 'cam10']
    """
    parts = re.split(r"(\d+)", text.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], text


def _walk(root: Path, known: dict[str, _Folder], found: dict[str, _Folder]) -> Scan:
    """Folders in their own places first, then what links lead to, in the order of their names."""
    scan = Scan()
    seen: set[tuple[int, int]] = set()
    places, links = deque([""]), deque[str]()
    while places or links:
        by_link = not places
        name = links.popleft() if by_link else places.popleft()
        try:
            status = (root / name).stat()
            identity = status.st_dev, status.st_ino
            if identity in seen:
                scan.repeated.append(name)
                continue
            seen.add(identity)
            stamp = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            entry = known.get(name)
            if entry is None or entry.stamp != stamp:
                entry = _read_folder(root / name, stamp)
        except OSError as error:
            raise DataError(
                f"{error.filename or root / name}: cannot be read ({error.strerror}); make it "
                "readable, or move it out of the data"
            ) from error
        found[name] = entry
        below = f"{name}/" if name else ""
        scan.images += [below + image for image in entry.images]
        scan.dangling += [below + link for link in entry.dangling]
        scan.hidden += entry.hidden
        scan.others += entry.others
        places.extend(below + child for child in entry.folders)
        links.extend(below + child for child in entry.links)
    scan.images.sort()
    return scan


def _read_folder(path: Path, stamp: list[int]) -> _Folder:
    entry = _Folder(stamp, [], [], [], [], 0, 0)
    now = time.time_ns()
    links, suffixes = False, tuple(IMAGE_SUFFIXES)
    with os.scandir(path) as children:
        for child in children:
            if child.name.startswith("."):
                entry.hidden += 1
                continue
            kind = _kind(child)
            links = links or child.is_symlink()
            if kind == "folder":
                (entry.links if child.is_symlink() else entry.folders).append(child.name)
            elif kind == "nothing":
                entry.dangling.append(child.name)
            elif kind == "file" and child.name.lower().endswith(suffixes):
                entry.images.append(child.name)
            else:
                entry.others += 1
    for names in (entry.images, entry.folders, entry.links, entry.dangling):
        names.sort()
    # What changes again within the resolution of the times would go unseen.
    if links or now - max(stamp[:2]) < _SETTLED:
        entry.stamp = []
    return entry


def _kind(child: os.DirEntry[str]) -> Literal["folder", "file", "nothing", "other"]:
    """What an entry is, or what the link leads to."""
    try:
        if child.is_dir():
            return "folder"
        if child.is_file():
            return "file"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    return "nothing" if child.is_symlink() else "other"


def _read_cache(path: Path) -> dict[str, _Folder]:
    """The folders of an earlier scan; none where the file is missing or not what we write."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        if content["format"] != [_FORMAT, sorted(IMAGE_SUFFIXES)]:
            return {}
        return {name: _Folder(*values) for name, values in content["folders"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s: is not used (%s); the folder is read anew", path, error)
        return {}


def _write_cache(path: Path, found: dict[str, _Folder]) -> None:
    content = {
        "format": [_FORMAT, sorted(IMAGE_SUFFIXES)],
        "folders": {name: list(vars(entry).values()) for name, entry in found.items()},
    }
    try:
        write_text(path, json.dumps(content))
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s); the next run reads the folder anew", path, error
        )
