"""Builds a gallery, adds images to it, and removes images."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reid.engine.logs import progress_bar
from reid.files import near
from reid.neighbors.indexes import FEWEST_FOR_IVFPQ, Index, Kind, build_index
from reid.neighbors.recall import GOOD_RECALL, Recall, tune_index
from reid.registry import ConfigError
from reid.structures import DataError
from reid.workflows.search.features import ModelChoice, drop_unfinished, embed, short
from reid.workflows.search.gallery import (
    Entries,
    Gallery,
    IndexNote,
    changing,
    is_gallery,
    read_gallery,
    write_gallery,
)

logger = logging.getLogger(__name__)

_MOST_GROWTH = 2  # times the images that an index was built on; then it is built anew


@dataclass(frozen=True)
class Change:
    """A change of a gallery.

    Attributes:
        gallery: The gallery after the change.
        added: Images that are new in it.
        replaced: Images whose file has changed, with new features.
        unchanged: Images that were there already.
        removed: Images that were removed.
        unreadable: (path, why) of images that could not be read.
    """

    gallery: Gallery
    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    removed: int = 0
    unreadable: Sequence[tuple[str, str]] = ()

    def __str__(self) -> str:
        counts = {
            "added": self.added,
            "replaced": self.replaced,
            "there already": self.unchanged,
            "removed": self.removed,
            "unreadable": len(self.unreadable),
        }
        said = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
        return f"{said or 'nothing changed'}\n{describe(self.gallery)}"


def describe(gallery: Gallery) -> str:
    """Describes a gallery in three lines."""
    origin, note = gallery.origin, gallery.note
    known = int((gallery.camids >= 0).sum())
    cameras = f"{len(gallery.cameras):,} cameras" if gallery.cameras else "no cameras known"
    if 0 < known < len(gallery):
        cameras += f" ({len(gallery) - known:,} images of unknown ones)"
    recall = f", {note.recall}" if note.recall is not None else ""
    place = near(origin.model) if origin.model else "unknown"
    return (
        f"gallery: {len(gallery):,} images, {cameras}, {gallery.features.shape[1]} dimensions\n"
        f"model:   {place} (fingerprint {short(origin.fingerprint)})\n"
        f"index:   {note.kind}{recall}"
    )


def build(
    folder: Path,
    sources: Sequence[Path],
    choice: ModelChoice,
    *,
    index: Kind = "exact",
    replace_old: bool = False,
) -> Change:
    """Makes a gallery of pictures, or of a file of features.

    Args:
        folder: For the gallery alone.
        sources: See `embed`.
        choice: The model.
        index: How it is searched.
        replace_old: Replace a gallery that is there.

    Raises:
        ConfigError: There is a gallery already, another process writes it, there is no model, or
            there are too few images for the index.
        DataError: A file is missing or broken, or no image can be read.
        OutputError: The gallery cannot be written.
        Interrupted: A signal came; the same call goes on.
    """
    if is_gallery(folder) and not replace_old:
        raise ConfigError(f"{folder}: has a gallery; add to it, or pass --overwrite")
    with changing(folder):
        found = embed(sources, choice, folder)
        gallery = Gallery.of(found.entries, found.origin)
        gallery = with_index(gallery, index)
        write_gallery(folder, gallery)
        drop_unfinished(folder)
    return Change(gallery, added=len(gallery), unreadable=found.unreadable)


def add(folder: Path, sources: Sequence[Path], choice: ModelChoice) -> Change:
    """Adds images to a gallery.

    An image that is there already is replaced if its file has changed, and skipped if not.

    Args:
        folder: Of the gallery.
        sources: See `embed`.
        choice: The model; by default the gallery's.

    Raises:
        ConfigError: The model is another than the gallery's, or another process writes it.
        DataError: A file is missing or broken, or no image can be read.
        OutputError: The gallery cannot be written; it is as before.
        Interrupted: A signal came; the same call goes on.
    """
    read_gallery(folder)  # before a folder is made
    with changing(folder):
        old = read_gallery(folder)
        found = embed(sources, choice, folder, old.origin)
        new, count = found.entries, len(found.entries.paths)
        if new.features.shape[1] != old.features.shape[1]:
            raise DataError(
                f"features: expected {old.features.shape[1]} dimensions as the gallery's, got "
                f"{new.features.shape[1]}"
            )
        places = {path: row for row, path in enumerate(old.paths)}
        rows = np.array([places.get(path, -1) for path in new.paths])
        there = rows >= 0
        same = there.copy()
        # A deleted file has no hash to compare, so its features are compared instead.
        same[there] = (old.hashes[rows[there]] == new.hashes[there]).all(1) & (
            new.hashes[there].any(1)
            | (np.abs(old.features[rows[there]] - new.features[there]).max(1) < 1e-6)
        )
        outdated = rows[there & ~same]
        chosen = np.flatnonzero(~same)
        gallery = old
        if len(chosen):
            gallery = _joined(old, outdated, _some(new, chosen))
            write_gallery(folder, gallery)
        drop_unfinished(folder)
    replaced = len(outdated)
    return Change(
        gallery,
        added=len(chosen) - replaced,
        replaced=replaced,
        unchanged=count - len(chosen),
        unreadable=found.unreadable,
    )


def remove(folder: Path, paths: Sequence[str] = (), patterns: Sequence[str] = ()) -> Change:
    """Takes images out of a gallery; their files stay.

    Args:
        folder: Of the gallery.
        paths: Of images, or of folders with all below them.
        patterns: With `*`, `?` and `[...]`, of whole paths or of names of files.

    Raises:
        ConfigError: Nothing is named, or another process writes the gallery.
        DataError: A path or pattern fits no image, or fits all that there are.
        OutputError: The gallery cannot be written; it is as before.
    """
    if not paths and not patterns:
        raise ConfigError("remove: expected a path or a --pattern, got none")
    read_gallery(folder)
    with changing(folder):
        old = read_gallery(folder)
        gone = np.zeros(len(old), bool)
        names = list(old.paths)
        for path in paths:
            full = os.path.realpath(path)
            below = full.rstrip("/") + "/"
            fits = [name == full or name.startswith(below) for name in names]
            _mark(gone, fits, path)
        for pattern in patterns:
            fits = [
                fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern)
                for name in names
            ]
            _mark(gone, fits, pattern)
        if gone.all():
            raise DataError(
                f"remove: all {len(old):,} images would go; delete the folder {folder} instead"
            )
        gallery = _joined(old, np.flatnonzero(gone), None)
        write_gallery(folder, gallery)
    return Change(gallery, removed=int(gone.sum()))


def with_index(gallery: Gallery, kind: Kind) -> Gallery:
    """The gallery with a new index, whose recall is measured.

    Raises:
        ConfigError: There are too few images for it.
    """
    try:
        with progress_bar(f"Building the {kind} index", "img") as progress:
            index = build_index(kind, gallery.features, progress)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _noted(gallery, kind, index, len(gallery))


def _noted(gallery: Gallery, kind: Kind, index: Index | None, built_on: int) -> Gallery:
    """The gallery with its index as arrays, and with the measured recall."""
    if index is None:
        return replace(gallery, note=IndexNote(), arrays={})
    recall: Recall | None = None
    if len(gallery) > 1:
        recall = tune_index(index, gallery.features)
        if recall.value < GOOD_RECALL:
            logger.warning(
                "index: %s finds only %.3f of the %d nearest images on this data; build with "
                "--index exact where none may be missed",
                kind,
                recall.value,
                recall.neighbors,
            )
    note = IndexNote(kind, index.effort, built_on, recall)
    return replace(gallery, note=note, arrays=index.arrays())


def _joined(old: Gallery, gone: npt.NDArray[np.int64], new: Entries | None) -> Gallery:
    """The gallery without some rows and with new ones at its end; also updates the index."""
    kept = old.entries(np.delete(np.arange(len(old)), gone)) if len(gone) else old.entries()
    both = kept if new is None else _stacked(kept, new)
    gallery = Gallery.of(both, old.origin)
    note = old.note
    grown = len(gallery) > _MOST_GROWTH * max(note.built_on, 1)
    if note.kind == "exact" or len(gone) or new is None or grown:
        kind = note.kind
        if kind == "ivfpq" and len(gallery) < FEWEST_FOR_IVFPQ:
            logger.warning("index: %s images are too few for ivfpq; it is exact now", len(gallery))
            kind = "exact"
        return with_index(gallery, kind)
    index = _restored(old)
    assert index is not None
    with progress_bar(f"Adding to the {note.kind} index", "img") as progress:
        index.add(new.features, progress)
    return _noted(gallery, note.kind, index, note.built_on)


def _restored(gallery: Gallery) -> Index | None:
    try:
        return gallery.index()
    except ValueError as error:
        raise DataError(f"the gallery's index is broken ({error}); build it anew") from error


def _stacked(first: Entries, second: Entries) -> Entries:
    return Entries(
        np.concatenate((first.features, second.features)),
        [*first.paths, *second.paths],
        [*first.cameras, *second.cameras],
        np.concatenate((first.hashes, second.hashes)),
    )


def _some(entries: Entries, rows: npt.NDArray[np.int64]) -> Entries:
    places = rows.tolist()
    return Entries(
        entries.features[rows],
        [entries.paths[row] for row in places],
        [entries.cameras[row] for row in places],
        entries.hashes[rows],
    )


def _mark(gone: npt.NDArray[np.bool_], fits: Sequence[bool], what: str) -> None:
    """Marks images to remove.

    Raises:
        DataError: There is none.
    """
    chosen = np.array(fits, bool)
    if not chosen.any():
        raise DataError(f"{what}: no image of the gallery fits; nothing was removed")
    gone |= chosen
