"""Finds the images below a folder; a large tree is not read again unless it changes."""

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

from reid.data.images import readable_kinds, why_not_read
from reid.file_kinds import OTHER_SUFFIXES, PICTURE_SUFFIXES, VIDEO_SUFFIXES, kind_of_file
from reid.files import InputError, read_json, write_text
from reid.structures import DataError

logger = logging.getLogger(__name__)

CACHED_FROM = 10_000  # files; a smaller tree is read in some ten milliseconds
_FORMAT = 2  # to be raised when files are sorted in another way
_SHOWN = 3
_NO_PICTURES = VIDEO_SUFFIXES | OTHER_SUFFIXES
_UNREADABLE = "cannot be read"
_SETTLED = 2_000_000_000  # ns; no file system's times are coarser than this


@dataclass
class Scan:
    """The files below a folder.

    Attributes:
        images: Paths relative to the folder, with `/`, in the order of their names.
        unread: Paths of pictures of kinds that are not read, by kind (`FileKind.name`).
        others: Numbers of files that are not pictures, by suffix.
        hidden: Number of files and folders whose name starts with a dot; never opened.
        odd: Pipes, sockets and devices.
        dangling: Symbolic links that lead nowhere.
        repeated: Symbolic links to folders that were read already, such as a parent.
        folders: The folder's own folders, and links to folders.
    """

    images: list[str] = field(default_factory=list)
    unread: dict[str, list[str]] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    hidden: int = 0
    odd: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def passed_over(self) -> str:
        """What was passed over, in words; empty if nothing was."""
        parts = [
            f"{kind} pictures, which are not read ({why_not_read(kind)}): {_first(paths)}"
            for kind, paths in self.unread.items()
        ]
        if self.others:
            by_count = sorted(self.others.items(), key=lambda pair: (-pair[1], pair[0]))
            shown = ", ".join(f"{suffix} {count:,}" for suffix, count in by_count[:_SHOWN])
            more = ", ..." if len(by_count) > _SHOWN else ""
            parts.append(f"files that are no images: {sum(self.others.values()):,} ({shown}{more})")
        if self.hidden:
            parts.append(f"hidden files or folders: {self.hidden:,}")
        parts += [
            f"{what}: {_first(paths)}"
            for what, paths in (
                ("pipes, sockets or devices", self.odd),
                ("links that lead nowhere", self.dangling),
                ("links to folders that are read already", self.repeated),
            )
            if paths
        ]
        return ", ".join(parts)


@dataclass
class _Folder:
    """The entries of one folder, sorted by name."""

    stamp: list[int]
    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)  # to folders
    dangling: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    unread: dict[str, list[str]] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    hidden: int = 0


def scan_images(folder: Path) -> Scan:
    """All images below a folder.

    A file is an image if its suffix says so, or if its suffix is unknown and its first bytes are a
    picture's. For nearly all files the name is enough.

    Links to files and folders are followed. Each folder is read once: in its own place if it lies
    below `folder`, else under the first link to it; so links in a circle come to an end.

    A tree of `CACHED_FROM` images or more is remembered in `$XDG_CACHE_HOME/reid` or
    `~/.cache/reid`. A folder whose times and inode have not changed is not read again, unless it
    has links, or files that were recognised by their content: their changes do not show in the
    folder's times.

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


def scan_folder(folder: Path) -> Scan:
    """The images of a folder alone, without those of the folders in it.

    Unlike `scan_images`, this trusts the suffix of a picture without asking the system whether the
    entry is a file. A pipe or a dangling link raises an error only when it is read.

    Raises:
        DataError: `folder` is missing, or cannot be read.
    """
    scan = Scan()
    try:
        names = os.listdir(folder)  # noqa: PTH208  (half a million names in one folder)
    except OSError as error:
        raise _cannot_be_read(folder, error) from error
    for name in names:
        if name.startswith("."):
            scan.hidden += 1
            continue
        kind = _kind_by_suffix(name)
        if kind is None:
            path = os.path.join(folder, name)  # noqa: PTH118  (for each of many files)
            if not os.path.isfile(path):  # noqa: PTH113
                continue
            kind = _kind_by_content(path)
        _put(scan, name, kind)
    scan.images.sort()
    for paths in scan.unread.values():
        paths.sort()
    return scan


def _cache_file(folder: Path) -> Path | None:
    """The cache file of a folder; None if the user has no home."""
    name = f"scan-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()}.json"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "reid", name)
    except RuntimeError:
        return None


def natural_key(text: str) -> tuple[list[str | int], str]:
    """A key that sorts as people do: numbers by value, capitals and small letters alike.

    >>> sorted(["cam10", "Cam2", "cam1"], key=natural_key)
    ['cam1', 'Cam2', 'cam10']
    """
    parts = re.split(r"(\d+)", text.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], text


def _walk(root: Path, known: dict[str, _Folder], found: dict[str, _Folder]) -> Scan:
    """Reads real folders first, then the targets of links, in the order of their names."""
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
            raise _cannot_be_read(root / name, error) from error
        found[name] = entry
        below = f"{name}/" if name else ""
        scan.images += [below + image for image in entry.images]
        scan.dangling += [below + link for link in entry.dangling]
        scan.odd += [below + odd for odd in entry.odd]
        scan.hidden += entry.hidden
        for suffix, count in entry.others.items():
            scan.others[suffix] = scan.others.get(suffix, 0) + count
        for kind, names in entry.unread.items():
            scan.unread.setdefault(kind, []).extend(below + picture for picture in names)
        if not name:
            scan.folders = sorted([*entry.folders, *entry.links])
        places.extend(below + child for child in entry.folders)
        links.extend(below + child for child in entry.links)
    scan.images.sort()
    for paths in scan.unread.values():
        paths.sort()
    return scan


def _read_folder(path: Path, stamp: list[int]) -> _Folder:
    entry = _Folder(stamp)
    now = time.time_ns()
    unseen = False  # whether something here may change without a change of the folder's times
    with os.scandir(path) as children:
        for child in children:
            if child.name.startswith("."):
                entry.hidden += 1
                continue
            what = _what(child)
            unseen = unseen or child.is_symlink()
            if what == "folder":
                (entry.links if child.is_symlink() else entry.folders).append(child.name)
            elif what == "nothing":
                entry.dangling.append(child.name)
            elif what == "odd":
                entry.odd.append(child.name)
            else:
                kind = _kind_by_suffix(child.name)
                if kind is None:
                    unseen, kind = True, _kind_by_content(child.path)
                _put(entry, child.name, kind)
    for names in (entry.images, entry.folders, entry.links, entry.dangling, entry.odd):
        names.sort()
    # A second change within the resolution of the times would go unseen.
    if unseen or now - max(stamp[:2]) < _SETTLED:
        entry.stamp = []
    return entry


def _kind_by_suffix(name: str) -> str | None:
    """The kind of picture that the suffix names; empty: not a picture; None: unknown suffix."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  (for each of many names)
    kind = PICTURE_SUFFIXES.get(suffix)
    return "" if kind is None and suffix in _NO_PICTURES else kind


def _kind_by_content(path: str) -> str:
    """The kind of picture that a file's content shows; empty: not a picture."""
    try:
        kind = kind_of_file(path)
    except InputError:  # it may not be read, or is gone again
        return _UNREADABLE
    return kind.name if kind is not None and kind.group == "picture" else ""


def _put(found: Scan | _Folder, name: str, kind: str) -> None:
    """Puts a file into the list of its kind."""
    if kind in readable_kinds():
        found.images.append(name)
    elif kind == _UNREADABLE:
        found.others[kind] = found.others.get(kind, 0) + 1
    elif kind:
        found.unread.setdefault(kind, []).append(name)
    else:
        suffix = os.path.splitext(name)[1].lower() or "without a suffix"  # noqa: PTH122
        found.others[suffix] = found.others.get(suffix, 0) + 1


def _first(paths: list[str]) -> str:
    """The number of paths, and the first of them, in words."""
    shown = ", ".join(map(repr, paths[:_SHOWN]))
    return f"{len(paths):,} ({shown}{', ...' if len(paths) > _SHOWN else ''})"


def _cannot_be_read(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{error.filename or path}: cannot be read ({error.strerror}); make it readable, or move "
        "it out of the data"
    )


def _what(child: os.DirEntry[str]) -> Literal["folder", "file", "nothing", "odd"]:
    """The type of an entry, or of a link's target."""
    try:
        if child.is_dir():
            return "folder"
        if child.is_file():
            return "file"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    if not child.is_symlink():
        return "odd"
    return "odd" if os.path.exists(child.path) else "nothing"  # noqa: PTH110


def _read_cache(path: Path) -> dict[str, _Folder]:
    """The folders of an earlier scan; empty if the file is missing or not ours."""
    try:
        if not path.exists():
            return {}
        content: Any = read_json(path)
        if content["format"] != _cache_format():
            return {}
        return {name: _Folder(*values) for name, values in content["folders"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s: is not used (%s); the folder is read anew", path, error)
        return {}


def _cache_format() -> list[Any]:
    """Everything but the folders that makes a cache valid."""
    return [_FORMAT, sorted(readable_kinds())]


def _write_cache(path: Path, found: dict[str, _Folder]) -> None:
    content = {
        "format": _cache_format(),
        "folders": {name: list(vars(entry).values()) for name, entry in found.items()},
    }
    try:
        write_text(path, json.dumps(content))
    except OSError as error:
        logger.warning(
            "%s: cannot be written (%s); the next run reads the folder anew", path, error
        )
