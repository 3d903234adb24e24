"""Finds the images of a gallery that are most similar to some pictures."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from reid.engine.logs import progress_bar
from reid.evaluation.reranking import rerank
from reid.evaluation.thresholds import Thresholds
from reid.neighbors.indexes import Index, Rows
from reid.neighbors.similar import Similar, most_similar
from reid.registry import ConfigError
from reid.shipped import tool
from reid.structures import DataError, ProgressBar
from reid.workflows.search.features import ModelChoice, embed
from reid.workflows.search.gallery import Entries, Gallery, Hashes, read_gallery

logger = logging.getLogger(__name__)

Cameras = Literal["all", "same", "other"]
_MOST_ANSWERS = 10_000
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class QuerySettings:
    """The settings of a query.

    Attributes:
        top: Answers for each query.
        rerank: How many of the first answers k-reciprocal re-ranking sorts again; 0: none.
        k1: Of the re-ranking; see `rerank`.
        k2: Of the re-ranking.
        lambda_value: Of the re-ranking.
        cameras: `same` takes images of the query's camera alone, `other` those of other cameras.
            Images of unknown cameras are then left out.
        false_per_million: Which threshold marks the same person; None: the recommended one.

    Raises:
        ConfigError: A value is out of its range.
    """

    top: int = 10
    rerank: int = 0
    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3
    cameras: Cameras = "all"
    false_per_million: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top <= _MOST_ANSWERS:
            raise ConfigError(f"top: expected 1 to {_MOST_ANSWERS:,}, got {self.top}")
        if self.rerank and not self.top <= self.rerank <= _MOST_ANSWERS:
            raise ConfigError(
                f"rerank: expected 0, or {self.top} (top) to {_MOST_ANSWERS:,}, got {self.rerank}"
            )
        if self.k1 < 1 or self.k2 < 1 or not 0 <= self.lambda_value <= 1:
            raise ConfigError(
                "expected k1 and k2 of 1 or more and lambda from 0 to 1, got "
                f"{self.k1}, {self.k2}, {self.lambda_value}"
            )


@dataclass(frozen=True)
class Answer:
    """An image that was found.

    Attributes:
        path: Of the image.
        camera: Empty: unknown.
        similarity: Cosine with the query, from -1 to 1.
        distance: Re-ranked distance; None: it was not re-ranked.
        same: Whether it counts as the same person; None: the model has no thresholds.
        false_per_million: At most so many of a million pairs of different persons are this
            similar; None: more than the model's table covers.
    """

    path: str
    camera: str
    similarity: float
    distance: float | None
    same: bool | None
    false_per_million: float | None


@dataclass(frozen=True)
class Answered:
    """A query and what was found, best first."""

    path: str
    camera: str
    answers: list[Answer]


@dataclass(frozen=True)
class Threshold:
    """The similarity from which images count as the same person.

    Attributes:
        similarity: The lowest cosine that counts.
        false_per_million: So many of a million pairs of different persons count as the same.
        source: Whether it was measured on labelled pairs or on clusters.
    """

    similarity: float
    false_per_million: float
    source: str


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        gallery: That was searched.
        queries: With their answers.
        threshold: None: the model has none.
        unreadable: (path, why) of queries that could not be read.
        reranked: How many answers of each query were re-ranked; 0: none.
    """

    gallery: Gallery
    queries: list[Answered]
    threshold: Threshold | None
    unreadable: list[tuple[str, str]]
    reranked: int


def search(
    folder: Path, sources: Sequence[Path], choice: ModelChoice, settings: QuerySettings
) -> Found:
    """The images of a gallery that are most similar to each query.

    An image is never its own match: images with the query's path (after following links) or with
    the same bytes are left out. So a copy of a file finds other pictures of the person, not itself.

    Args:
        folder: Of the gallery.
        sources: See `embed`.
        choice: The model; by default the gallery's.
        settings: What is looked for.

    Raises:
        ConfigError: The model is another than the gallery's, or a setting does not fit.
        DataError: A file is missing or broken, or the camera of a query is asked for and unknown.
    """
    gallery = read_gallery(folder)
    if settings.cameras != "all" and not gallery.cameras:
        raise ConfigError(
            f"cameras: {settings.cameras}: the gallery knows no cameras; build it with "
            "--camera-folders, of a list with cameras or of a file that has them"
        )
    with tempfile.TemporaryDirectory() as work:
        found = embed(sources, choice, Path(work), gallery.origin)
    queries = with_known_cameras(gallery, found.entries)
    if queries.features.shape[1] != gallery.features.shape[1]:
        raise DataError(
            f"features: expected {gallery.features.shape[1]} dimensions as the gallery's, got "
            f"{queries.features.shape[1]}"
        )
    threshold = choose_threshold(found.thresholds, settings.false_per_million)
    try:
        index = gallery.index()
    except ValueError as error:
        raise DataError(f"{folder}: its index is broken ({error}); build it anew") from error
    with progress_bar("Searching", "query") as progress:
        lines = find(gallery, index, queries, settings, progress)
    answered = []
    for row, line in enumerate(lines):
        answers = [_answer(gallery, *one, threshold, found.thresholds) for one in line]
        answered.append(Answered(queries.paths[row], queries.cameras[row], answers))
    return Found(gallery, answered, threshold, found.unreadable, settings.rerank)


def choose_threshold(table: Thresholds | None, rate: float | None) -> Threshold | None:
    """The threshold to mark answers with.

    Args:
        table: The model's thresholds; None: it has none.
        rate: False matches per million pairs; None: the recommended threshold.

    Raises:
        ConfigError: The table has no such rate, or a rate is given but there is no table.
    """
    if table is None:
        if rate is not None:
            raise ConfigError(
                f"false matches per million: got {rate:g}, but the model has no thresholds; make "
                f"them with {tool('thresholds')}"
            )
        logger.info(
            "No answer is marked as the same person: the model has no thresholds; make them with "
            "%s",
            tool("thresholds"),
        )
        return None
    try:
        similarity = table.recommended if rate is None else table.at(rate)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    promised = table.false_per_million(similarity)
    assert promised is not None  # the similarity is one of the table
    return Threshold(similarity, promised, table.source)


def find(
    gallery: Gallery,
    index: Index | None,
    queries: Entries,
    settings: QuerySettings,
    progress: ProgressBar | None = None,
) -> list[list[tuple[int, float, float | None]]]:
    """For each query (row of the gallery, similarity, re-ranked distance), best first.

    Args:
        gallery: To search.
        index: Of the gallery.
        queries: Q images.
        settings: What is looked for.
        progress: Called with (queries done, Q).

    Raises:
        DataError: The camera of a query is asked for and unknown.
    """
    own = own_rows(gallery, queries)
    lines: list[list[tuple[int, float, float | None]]] = [[] for _ in queries.paths]
    done = 0
    for places, allowed in _by_camera(gallery, queries, settings.cameras):
        for start in range(0, len(places), _QUERIES_AT_ONCE):
            block = places[start : start + _QUERIES_AT_ONCE]
            wanted = max(settings.top, settings.rerank)
            spare = 1 + max(len(own.get(place, ())) for place in block.tolist())
            count = min(wanted + spare, len(gallery))
            similar = most_similar(
                index, queries.features[block], gallery.features, count, allowed=allowed
            )
            for line, place in enumerate(block.tolist()):
                rows, scores = _without_itself(
                    gallery, similar, line, queries.paths[place], own.get(place, set()), wanted
                )
                lines[place] = _ordered(gallery, queries.features[place], rows, scores, settings)
            done += len(block)
            if progress is not None:
                progress(done, len(lines))
    return lines


def own_rows(gallery: Gallery, queries: Entries) -> dict[int, set[int]]:
    """For queries whose exact file content is in the gallery, the rows that have it."""
    keys = [_halves(gallery.hashes), _halves(queries.hashes)]
    near = np.flatnonzero(np.isin(keys[0][:, 0], keys[1][keys[1].any(1), 0]))
    places: dict[bytes, set[int]] = {}
    for row in near.tolist():
        places.setdefault(gallery.hashes[row].tobytes(), set()).add(row)
    return {
        place: places[key]
        for place, key in enumerate(hashes.tobytes() for hashes in queries.hashes)
        if any(key) and key in places
    }


def _halves(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """(N, 2) the hashes as numbers."""
    return np.ascontiguousarray(hashes).view(np.uint64)


def with_known_cameras(gallery: Gallery, queries: Entries) -> Entries:
    """The queries; if a camera is unknown and the image is in the gallery, its camera there."""
    own = own_rows(gallery, queries)
    unknown = {path for path, name in zip(queries.paths, queries.cameras, strict=True) if not name}
    by_path = {path: row for row, path in enumerate(gallery.paths) if path in unknown}
    cameras = []
    for place, (path, name) in enumerate(zip(queries.paths, queries.cameras, strict=True)):
        rows = [by_path[path]] if path in by_path else sorted(own.get(place, ()))
        cameras.append(name or next((gallery.camera(row) for row in rows), ""))
    return queries._replace(cameras=cameras)


def _by_camera(
    gallery: Gallery, queries: Entries, cameras: Cameras
) -> list[tuple[Rows, npt.NDArray[np.bool_] | None]]:
    """Queries that may be answered by the same rows, and these rows; None: all of them."""
    everyone = np.arange(len(queries.paths))
    if cameras == "all":
        return [(everyone, None)]
    names = np.array(queries.cameras)
    if (names == "").any():
        place = int(np.flatnonzero(names == "")[0])
        raise DataError(
            f"{queries.paths[place]}: its camera is unknown, so `{cameras}` cameras cannot be "
            "chosen; name it with --camera, --camera-folders or a list with cameras"
        )
    groups: list[tuple[Rows, npt.NDArray[np.bool_] | None]] = []
    for name in sorted(set(queries.cameras)):
        number = gallery.cameras.index(name) if name in gallery.cameras else -2
        of_it = gallery.camids == number
        allowed = of_it if cameras == "same" else (gallery.camids >= 0) & ~of_it
        if not allowed.any():
            logger.warning("camera %s: the gallery has no image of %s", name,
                           "it" if cameras == "same" else "another")  # fmt: skip
        groups.append((everyone[names == name], allowed))
    return groups


def _without_itself(
    gallery: Gallery, similar: Similar, line: int, path: str, own: set[int], count: int
) -> tuple[Rows, npt.NDArray[np.float32]]:
    """The first `count` rows that are not the query itself, and their scores."""
    kept = []
    for place, row in enumerate(similar.rows[line].tolist()):
        if row >= 0 and row not in own and gallery.paths[row] != path:
            kept.append(place)
            if len(kept) == count:
                break
    return similar.rows[line][kept], similar.scores[line][kept]


def _ordered(
    gallery: Gallery,
    feature: npt.NDArray[np.float32],
    rows: Rows,
    scores: npt.NDArray[np.float32],
    settings: QuerySettings,
) -> list[tuple[int, float, float | None]]:
    """The first answers to a query, the re-ranked ones by their new distance."""
    similarities = np.clip(scores, -1, 1).tolist()
    if not settings.rerank or not len(rows):
        distances: list[float | None] = [None] * len(rows)
        return [*zip(rows.tolist(), similarities, distances, strict=True)][: settings.top]
    candidates = torch.from_numpy(gallery.features[rows])
    blocks = rerank(
        torch.from_numpy(feature[None]),
        candidates,
        k1=settings.k1,
        k2=settings.k2,
        lambda_value=settings.lambda_value,
    )
    reranked = np.concatenate([block for _, block in blocks])[0]
    order = np.argsort(reranked, kind="stable")[: settings.top].tolist()
    return [(int(rows[at]), similarities[at], float(reranked[at])) for at in order]


def _answer(
    gallery: Gallery,
    row: int,
    similarity: float,
    distance: float | None,
    threshold: Threshold | None,
    table: Thresholds | None,
) -> Answer:
    return Answer(
        gallery.paths[row],
        gallery.camera(row),
        similarity,
        distance,
        None if threshold is None else similarity >= threshold.similarity,
        None if table is None else table.false_per_million(similarity),
    )
