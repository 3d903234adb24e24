"""Turns pictures, or a file of features, into entries of a gallery."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reid.assembly.model_card import ModelCard
from reid.evaluation.feature_rows import SUFFIXES, FeatureRows, read_feature_rows
from reid.evaluation.thresholds import Thresholds
from reid.files import InputError, file_sha256, near, readable_name
from reid.registry import ConfigError
from reid.shipped import tool
from reid.structures import UNKNOWN_CAMERA, DataError
from reid.workflows.extract import extract
from reid.workflows.extraction_lists import ImageList, list_paths
from reid.workflows.predict import Predictor
from reid.workflows.search.gallery import HASH_BYTES, Entries, Hashes, Origin
from reid.workflows.thresholds import load_thresholds

logger = logging.getLogger(__name__)

_FEW = 64  # images; reading these takes less time than starting worker processes
_STEM = "adding"
_SHOWN = 5


@dataclass(frozen=True)
class ModelChoice:
    """Which model makes features of pictures, and how.

    Attributes:
        model: Run folder, config or ONNX file; None: the gallery's.
        weights: In place of the run's or the config's.
        device: See `Predictor`.
        batch_size: See `Predictor`.
        workers: Processes that read images.
        camera_folders: Images in a folder `entrance` of a given folder are of that camera.
        camera: The camera of all images; empty: folders, lists or files name the cameras.
    """

    model: Path | None = None
    weights: Path | None = None
    device: str | None = None
    batch_size: int | None = None
    workers: int = 4
    camera_folders: bool = False
    camera: str = ""


@dataclass(frozen=True)
class Embedded:
    """Features of images.

    Attributes:
        entries: The images, each once.
        origin: The model that made them.
        unreadable: (path, why) of images that are left out.
        thresholds: Of the model, where it has some.
    """

    entries: Entries
    origin: Origin
    unreadable: list[tuple[str, str]]
    thresholds: Thresholds | None


def embed(
    sources: Sequence[Path], choice: ModelChoice, work: Path, stored: Origin | None = None
) -> Embedded:
    """Features of pictures, folders and lists, or those of one file.

    Args:
        sources: See `list_paths`; or one file of `tools/extract.py`.
        choice: The model.
        work: A folder for unfinished work. The same call after a stop goes on with it.
        stored: The model of the gallery; features of another one are refused.

    Raises:
        ConfigError: No model is named or known, or it is another than the gallery's.
        DataError: A file is missing or broken, or no image can be read.
        WeightsError: The weights are broken or do not fit.
        Interrupted: A signal came.
    """
    files = [path for path in sources if path.suffix.lower() in SUFFIXES]
    if files and len(sources) > 1:
        raise ConfigError(f"{files[0]}: pass a file of features alone, got {len(sources)} paths")
    if files:
        return _from_file(files[0], choice, stored)
    predictor = _predictor(choice, stored)
    origin = _origin(predictor, choice, stored)
    thresholds = predictor.thresholds or _thresholds_of(origin)
    images = list_paths(sources, predictor.card, camera_folders=choice.camera_folders)
    if choice.camera:
        images = _of_camera(images, choice.camera, predictor.card)
    job = "\0".join([predictor.fingerprint, *(str(path.absolute()) for path in sources)])
    name = hashlib.sha256(os.fsencode(job)).hexdigest()[:16]
    output = work / f"{_STEM}-{name}.safetensors"
    output.unlink(missing_ok=True)
    workers = choice.workers if len(images.records) > _FEW else 0
    try:
        written = extract(predictor, images, output, num_workers=workers)
        rows = read_feature_rows(output)
    finally:
        output.unlink(missing_ok=True)
    for path, why in written.unreadable[:_SHOWN]:
        logger.warning("Left out: %s", why or path)
    if len(written.unreadable) > _SHOWN:
        logger.warning("Left out: %d images in all", len(written.unreadable))
    return Embedded(_entries(rows), origin, written.unreadable, thresholds)


def _of_camera(images: ImageList, camera: str, card: ModelCard) -> ImageList:
    """The same images, all of one camera, by its number in the model if that has learned it."""
    try:
        number = card.camera_number(camera)
    except ValueError:
        number = UNKNOWN_CAMERA
    seen = [replace(record, camid=number) for record in images.seen]
    return replace(images, seen=seen, cameras=[camera] * len(seen))


def drop_unfinished(work: Path) -> None:
    """Removes the unfinished work of stopped calls of `embed`."""
    for left in work.glob(f"{_STEM}-*.safetensors.parts"):
        shutil.rmtree(left, ignore_errors=True)


def _from_file(path: Path, choice: ModelChoice, stored: Origin | None) -> Embedded:
    rows = read_feature_rows(path)
    if not rows.fingerprint:
        raise DataError(
            f"{path}: its provenance names no model (`fingerprint`), so it cannot be compared with "
            f"other features; make it with {tool('extract')}"
        )
    if not len(rows):
        raise DataError(f"{path}: has no features")
    origin = _told(rows)
    if choice.model is not None:
        origin = _origin(_predictor(choice, None), choice, None)
        refuse_other(rows.fingerprint, str(path), origin)
    if stored is not None:
        refuse_other(rows.fingerprint, str(path), stored)
        origin = stored
    if choice.camera:
        rows = replace(rows, cameras=[choice.camera] * len(rows))
    return Embedded(_entries(rows), origin, [], _thresholds_of(origin))


def _thresholds_of(origin: Origin) -> Thresholds | None:
    """Those beside a gallery's weights: an ONNX file of the same model may have none."""
    if not origin.weights or not Path(origin.weights).is_file():
        return None
    return load_thresholds(Path(origin.weights), origin.fingerprint)


def _told(rows: FeatureRows) -> Origin:
    """The model that a file of features names."""
    told = {name: rows.provenance.get(name) for name in ("weights", "weights_sha256")}
    text = {name: value for name, value in told.items() if isinstance(value, str)}
    weights = text.get("weights", "")
    place = str(Path(weights).absolute()) if weights and Path(weights).is_file() else ""
    place, digest = readable_name(place), readable_name(text.get("weights_sha256", ""))
    return Origin(readable_name(rows.fingerprint), place, place, digest)


def _predictor(choice: ModelChoice, stored: Origin | None) -> Predictor:
    """The model that was asked for, or the gallery's."""
    model, weights = choice.model, choice.weights
    if model is None:
        if stored is None:
            raise ConfigError("--model: expected the model that makes the features, got none")
        if not stored.model:
            raise ConfigError(
                "--model: expected the model of the gallery, which was built from features and "
                "names none"
            )
        if not Path(stored.model).exists():
            raise ConfigError(
                f"the gallery's model {stored.model} is not there; pass --model with the place "
                "where it is now"
            )
        model = Path(stored.model)
        if weights is None and stored.weights_named:
            weights = Path(stored.weights)
    logger.info("Model: %s", near(model))
    predictor = Predictor(model, weights, batch_size=choice.batch_size, device=choice.device)
    if stored is not None:
        refuse_other(predictor.fingerprint, str(weights or model), stored)
    return predictor


def refuse_other(fingerprint: str, what: str, stored: Origin) -> None:
    """Refuses features of another model than the gallery's.

    Raises:
        ConfigError: The fingerprints differ.
    """
    if fingerprint != stored.fingerprint:
        place = stored.weights or stored.model or "its path is unknown"
        raise ConfigError(
            f"{what}: is of the model {short(fingerprint)}, the gallery of "
            f"{short(stored.fingerprint)} ({place}); features of another model, other weights, "
            "another input size or flip-test cannot be compared. Use the gallery's model, or build "
            "another gallery"
        )


def short(fingerprint: str) -> str:
    """The first 16 letters of a fingerprint, for messages."""
    return fingerprint[:16]


def _origin(predictor: Predictor, choice: ModelChoice, stored: Origin | None) -> Origin:
    if stored is not None:
        return stored
    assert choice.model is not None  # `_predictor` has refused it
    return Origin(
        predictor.fingerprint,
        readable_name(str(choice.model.absolute())),
        readable_name(str(predictor.weights.absolute())),
        predictor.card.weights_sha256,
        # A run may replace its best weights; a config may name only its backbone's weights.
        weights_named=choice.weights is not None or choice.model.is_dir(),
    )


def _entries(rows: FeatureRows) -> Entries:
    """Each image of a file once, features made unit vectors; rows of zeros are left out.

    Raises:
        DataError: None is left.
    """
    lengths = np.linalg.norm(rows.features, axis=1)
    paths = [os.path.realpath(path) if path else "" for path in rows.paths]
    seen: set[str] = set()
    kept: list[int] = []
    zeros = 0
    for row, path in enumerate(paths):
        if not path:
            raise DataError(f"features: row {row} has no path; each image of a gallery needs one")
        if not lengths[row] > 0:
            zeros += 1
        elif path not in seen:
            seen.add(path)
            kept.append(row)
    if zeros:
        logger.warning("Left out: %s features of zeros", f"{zeros:,}")
    if len(kept) + zeros < len(paths):
        repeated = len(paths) - len(kept) - zeros
        logger.info("%s images were listed twice or more; each counts once", f"{repeated:,}")
    if not kept:
        raise DataError("features: all of them are zeros")
    features = rows.features[kept]
    features /= lengths[kept][:, None]
    chosen = [paths[row] for row in kept]
    cameras = [readable_name(rows.cameras[row]) for row in kept]
    return Entries(features, chosen, cameras, hash_files(chosen))


def hash_files(paths: Sequence[str]) -> Hashes:
    """(N, 16) the first bytes of each file's SHA-256; zeros for one that is not there."""
    hashes = np.zeros((len(paths), HASH_BYTES), np.uint8)
    for row, path in enumerate(paths):
        try:
            digest = bytes.fromhex(file_sha256(path))
        except InputError:
            continue
        hashes[row] = np.frombuffer(digest[:HASH_BYTES], np.uint8)
    return hashes
