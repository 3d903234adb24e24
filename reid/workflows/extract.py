"""Writes features of many images to a file; after a stop it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from reid.assembly.provenance import LIBRARIES, git_state
from reid.data.loaders import eval_loader
from reid.engine.logs import progress_bar
from reid.engine.stopping import Interrupted, StopSignals
from reid.evaluation.feature_rows import SUFFIXES, FeatureRows, write_feature_rows
from reid.files import InputError, read_text, write_text, writing
from reid.locks import FolderInUse, locked
from reid.registry import ConfigError
from reid.structures import DataError, ImageRecord, ProgressBar
from reid.workflows.extraction_lists import ImageList
from reid.workflows.predict import Predictor

logger = logging.getLogger(__name__)

_SAVE_EVERY_S = 10.0
_SHOWN = 10


@dataclass(frozen=True)
class Extraction:
    """What an extraction has written.

    Attributes:
        path: The file.
        count: Images in it.
        dimension: D of the features.
        unreadable: (path, why) of the images that could not be read, which are not in it.
        resumed: How many images had been done before, by a run that was stopped.
    """

    path: Path
    count: int
    dimension: int
    unreadable: list[tuple[str, str]]
    resumed: int

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.count:,} features of {self.dimension} numbers"]
        if self.resumed:
            lines[0] += f"; {self.resumed:,} images were done before the stop"
        if self.unreadable:
            lines.append(f"{len(self.unreadable):,} images could not be read and are left out:")
            lines += [f"  {reason}" for _, reason in self.unreadable[:_SHOWN]]
            if len(self.unreadable) > _SHOWN:
                lines.append("  ... all of them are in the file's provenance")
        return "\n".join(lines)


def extract(
    predictor: Predictor,
    images: ImageList,
    output: Path,
    *,
    num_workers: int = 0,
    overwrite: bool = False,
) -> Extraction:
    """Writes the features of images, whole or not at all.

    While it works, the folder OUTPUT.parts beside the output holds the finished part. After a stop
    the same command goes on from it, and its result is the same to the bit. Images that cannot be
    read are left out, counted and named.

    Args:
        predictor: The model.
        images: Which.
        output: .npz or .safetensors; see `FeatureRows`.
        num_workers: Processes that read images; 0: this one does.
        overwrite: Replace a file that is there already, and start anew.

    Raises:
        ConfigError: The output is there already or has another suffix, its parts are those of
            another extraction, or another process writes them.
        DataError: No image can be read.
        FloatingPointError: A feature is not finite.
        OutputError: A file cannot be written.
        Interrupted: A signal came; the finished part is kept.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"{output}: expected a file name that ends in {' or '.join(SUFFIXES)}")
    if output.is_dir():
        raise ConfigError(f"{output}: expected the name of a file, but it is a folder")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: is there already; choose another name, or pass --overwrite")
    folder = output.with_name(f"{output.name}.parts")
    try:
        with StopSignals() as signals, locked(folder):
            if overwrite:
                _Parts.drop(folder)
            job = _job(predictor, images)
            parts = _Parts(folder, job, len(images.records), predictor.dimension)
            resumed = parts.done
            if resumed:
                logger.info("Going on after %s of %s images", f"{resumed:,}", f"{parts.total:,}")
            with progress_bar(f"Extracting {images.name}", "img") as progress:
                parts.progress = progress
                _extract(predictor, images.seen, parts, num_workers, signals)
            unreadable = _unreadable(images, parts.failed)
            rows = _rows(predictor, images, parts.features(), parts.failed)
            with signals.delayed():
                write_feature_rows(output, rows)
                shutil.rmtree(folder)
    except FolderInUse as error:
        raise ConfigError(f"{output}: {error}") from None
    return Extraction(output, len(rows), predictor.dimension, unreadable, resumed)


def collect(
    predictor: Predictor, images: ImageList, *, num_workers: int = 0
) -> tuple[FeatureRows, list[tuple[str, str]]]:
    """Like `extract`, in memory: features, and (path, why) of the images that could not be read.

    Args:
        predictor: The model.
        images: Which.
        num_workers: Processes that read images; 0: this one does.

    Raises:
        DataError: No image can be read.
        FloatingPointError: A feature is not finite.
    """
    blocks: list[npt.NDArray[np.float32]] = []
    failed: dict[int, str] = {}
    with progress_bar(f"Extracting {images.name}", "img") as progress:
        for stop, features, errors in _batches(predictor, images.seen, 0, num_workers):
            blocks.append(features)
            failed |= errors
            progress(stop, len(images.seen))
    unreadable = _unreadable(images, failed)
    return _rows(predictor, images, np.concatenate(blocks), failed), unreadable


def _extract(
    predictor: Predictor,
    seen: Sequence[ImageRecord],
    parts: _Parts,
    num_workers: int,
    signals: StopSignals,
) -> None:
    """Extracts the images that are not done yet."""
    if parts.done == len(seen):
        return
    try:
        for stop, features, failed in _batches(predictor, seen, parts.done, num_workers):
            with signals.delayed():
                parts.add(stop, features, failed)
    except Interrupted:
        parts.save()
        raise
    parts.save()


def _batches(
    predictor: Predictor, seen: Sequence[ImageRecord], first: int, num_workers: int
) -> Iterator[tuple[int, npt.NDArray[np.float32], dict[int, str]]]:
    """The features batch by batch; the batches are the same wherever the extraction starts.

    Args:
        predictor: The model.
        seen: The images as the model sees them.
        first: Where to start; a multiple of the batch size.
        num_workers: Processes that read images.

    Yields:
        Where the batch stops, features of its images that could be read, and row -> why of the
        others.
    """
    loader = eval_loader(
        seen[first:],
        predictor.card.transform(),
        batch_size=predictor.batch_size,
        on_error="skip",
        num_workers=min(num_workers, os.cpu_count() or 1),
    )
    start = first
    for batch, errors in loader.loaded():
        stop = min(start + predictor.batch_size, len(seen))
        rows = (batch.index + first).tolist()
        features = np.empty((0, predictor.dimension), np.float32)
        if rows:
            features = predictor.network(batch.image, batch.camid).numpy()
        wrong = np.flatnonzero(~np.isfinite(features).all(1))
        if len(wrong):
            raise FloatingPointError(
                f"{seen[rows[int(wrong[0])]].path}: its feature is not finite; the model's "
                "weights are broken, or values are too large for the precision"
            )
        missing = sorted({*range(start, stop)} - {*rows})
        yield stop, features, dict(zip(missing, errors, strict=True))
        start = stop


def _unreadable(images: ImageList, failed: Mapping[int, str]) -> list[tuple[str, str]]:
    """(path, why) of the images that could not be read.

    Raises:
        DataError: These are all.
    """
    unreadable = [(images.records[row].path, why) for row, why in failed.items()]
    if len(unreadable) == len(images.records):
        raise DataError(f"none of {len(unreadable):,} images can be read: {unreadable[0][1]}")
    return unreadable


class _Parts:
    """The finished part of an extraction, on disk.

    `features.npy` has room for all features. Each time some are written to it, `done.jsonl` gets a
    line with the number of images done, the number of features, and the images that could not be
    read. The line follows once the features are on disk, so every complete line is true.

    Args:
        folder: The folder of the parts.
        job: Identifies model, images and settings; parts of another job are refused.
        total: Images.
        dimension: D of the features.

    Attributes:
        total: Images.
        done: Images that are on disk, or are known not to be readable.
        seen: Images that were added.
        failed: Row of an image that cannot be read -> why.
        progress: Called with (images done, all).

    Raises:
        ConfigError: The folder holds parts of another job.
    """

    _JOB, _JOURNAL, _FEATURES = "job.txt", "done.jsonl", "features.npy"

    def __init__(self, folder: Path, job: str, total: int, dimension: int) -> None:
        self.total, self.done, self.failed = total, 0, dict[int, str]()
        self._folder, self._journal = folder, folder / self._JOURNAL
        self._written, self._waiting = 0, list[npt.NDArray[np.float32]]()
        self._new_failed: dict[int, str] = {}
        self.progress: ProgressBar | None = None
        self._saved_at = time.monotonic()
        self._read(job)
        path = folder / self._FEATURES
        with writing(path):
            mode: Any = "r+" if self.done else "w+"
            self._features = open_memmap(path, mode, np.float32, (total, dimension))
        self.seen = self.done

    @classmethod
    def drop(cls, folder: Path) -> None:
        """Removes what an extraction has left in a folder that this process holds."""
        for name in (cls._JOB, cls._JOURNAL, cls._FEATURES):
            with writing(folder / name):
                (folder / name).unlink(missing_ok=True)

    def add(self, stop: int, features: npt.NDArray[np.float32], failed: dict[int, str]) -> None:
        """Takes the features of the images from `seen` to `stop`.

        Args:
            stop: Behind the last image.
            features: Of those that could be read, in order.
            failed: Row -> why, of the others.
        """
        self._waiting.append(features)
        self._new_failed |= failed
        self.seen = stop
        if self.progress is not None:
            self.progress(stop, self.total)
        if time.monotonic() - self._saved_at >= _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Writes what was added since.

        Raises:
            OutputError: The disk is full.
        """
        if self.seen == self.done:
            return
        with writing(self._journal):
            written, failed = self._written, [*self._new_failed.items()]
            for features in self._waiting:
                self._features[written : written + len(features)] = features
                written += len(features)
            self._features.flush()
            line = {"done": self.seen, "written": written, "failed": failed}
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.failed |= self._new_failed
        self._written = written
        self.done, self._waiting, self._new_failed = self.seen, [], {}
        self._saved_at = time.monotonic()

    def features(self) -> npt.NDArray[np.float32]:
        """Those of all images that could be read, in order, on disk."""
        features: npt.NDArray[np.float32] = self._features[: self._written]
        return features

    def _read(self, job: str) -> None:
        """Takes note of what an earlier process has done."""
        path = self._folder / self._JOB
        if not path.exists():
            write_text(path, job)
            return
        try:
            before = read_text(path)
            lines = read_text(self._journal).splitlines() if self._journal.exists() else []
        except InputError as error:
            raise ConfigError(f"{error}; remove {self._folder}") from error
        if before != job:
            raise ConfigError(
                f"{self._folder}: holds the beginning of an extraction with another model, other "
                "images or settings; remove it, or pass --overwrite"
            )
        for place, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:  # half a line of a killed process: cut it off before we append
                write_text(self._journal, "".join(f"{whole}\n" for whole in lines[:place]))
                break
            self.done, self._written = entry["done"], entry["written"]
            self.failed |= {int(row): why for row, why in entry["failed"]}


def _job(predictor: Predictor, images: ImageList) -> str:
    """A hash of model, settings and the files' paths and sizes, on which the features depend."""
    settings = [predictor.fingerprint, predictor.precision, predictor.batch_size]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for record in images.seen:
        try:
            status = os.stat(record.path)  # noqa: PTH116  (a million paths)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        line = f"{record.path}\0{record.camid}\0{state}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _rows(
    predictor: Predictor,
    images: ImageList,
    features: npt.NDArray[np.float32],
    failed: Mapping[int, str],
) -> FeatureRows:
    """Features of the images that could be read, with what is known of these."""
    kept = [row for row in range(len(images.records)) if row not in failed]
    card = predictor.card
    provenance = {
        **card.provenance,
        "fingerprint": card.fingerprint,
        "size": list(card.size),
        "flip": card.flip,
        "precision": predictor.precision,
        "batch_size": predictor.batch_size,
        "images": images.name,
        "unreadable": [(images.records[row].path, why) for row, why in failed.items()],
        "git": git_state(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return FeatureRows(
        features=features,
        paths=[images.records[row].path for row in kept],
        cameras=[images.cameras[row] for row in kept],
        splits=[images.splits[row] for row in kept],
        pids=np.array([images.records[row].pid for row in kept], np.int64),
        camids=np.array([images.records[row].camid for row in kept], np.int64),
        provenance=provenance,
    )
