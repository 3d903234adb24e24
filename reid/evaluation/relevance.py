"""Which gallery images are a query's matches, which are junk, which are wrong answers.

The protocol is the one of Market-1501 (Zheng et al., *Scalable Person Re-identification: A
Benchmark*, ICCV 2015): for each query, gallery images of the same identity and the same known
camera are left out, and so is junk (identity -1). Everything else stays, distractors as wrong
answers. A query whose camera is unknown (-1) loses no image to its camera. An image is never its
own match: if paths are known, gallery images with the query's path are junk for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reid.evaluation.ranking_kernels import JUNK, BoolArray, IntArray, count_matches, junk_mask
from reid.structures import UNKNOWN_CAMERA, FeatureSet, ImageRecord

Verdict = Literal["same", "other", "junk"]
"""The same person, another person, or an image that the protocol leaves out."""


@dataclass(frozen=True)
class Counts:
    """How many queries and gallery images the figures of a test set are based on.

    Attributes:
        queries: All queries.
        with_match: Queries that have a match. The figures are means over these.
        gallery: All gallery images.
        junk: Gallery images without an identity, which are left out for every query.
        distractors: Gallery images with an identity that no query has: wrong answers to all.
    """

    queries: int
    with_match: int
    gallery: int
    junk: int
    distractors: int

    @property
    def ignored(self) -> int:
        """Number of queries without a match, which are ignored."""
        return self.queries - self.with_match

    def as_dict(self) -> dict[str, dict[str, int]]:
        """The counts as results*.json has them."""
        return {
            "queries": {
                "all": self.queries,
                "with_match": self.with_match,
                "ignored": self.ignored,
            },
            "gallery": {
                "all": self.gallery,
                "junk": self.junk,
                "distractors": self.distractors,
            },
        }

    def text(self) -> str:
        """The counts as one line of text."""
        return (
            f"{self.queries:,} queries: {self.with_match:,} with a match, "
            f"{self.ignored:,} ignored; {self.gallery:,} gallery images: "
            f"{self.junk:,} junk, {self.distractors:,} distractors"
        )


@dataclass(frozen=True)
class Relevance:
    """Identities and cameras of Q queries and G gallery images, grouped for the ranking.

    Images that could not be read count as images without an identity.

    Attributes:
        query_pids: (Q,), -1 has no match.
        gallery_pids: (G,), -1 is junk.
        query_camids: (Q,), -1 = unknown.
        gallery_camids: (G,), -1 = unknown.
        by_pid: (G,) gallery indices ordered by (identity, index).
        start: (Q,) where the query's identity starts in `by_pid`.
        end: (Q,) where it ends; equal to start for queries of identity -1.
        junk: Gallery indices of the images that are junk for every query.
        itself_start: (Q + 1,) where the gallery indices of a query start in `itself`.
        itself: Gallery indices of the images that are the query itself, query after query.
    """

    query_pids: IntArray
    gallery_pids: IntArray
    query_camids: IntArray
    gallery_camids: IntArray
    by_pid: IntArray
    start: IntArray
    end: IntArray
    junk: IntArray
    itself_start: IntArray
    itself: IntArray

    @classmethod
    def of(
        cls,
        query: FeatureSet,
        gallery: FeatureSet,
        query_paths: Sequence[str] | None = None,
        gallery_paths: Sequence[str] | None = None,
    ) -> Relevance:
        """The relevance of gallery images to queries, from two sets of features.

        Args:
            query: Q images.
            gallery: G images.
            query_paths: Q paths, if they are known.
            gallery_paths: G paths, if they are known. Without both, it is unknown that a query and
                a gallery image are the same. Absolute paths are compared; links are not followed
                and files are not opened, so a copy counts as another image.

        Raises:
            ValueError: The paths are not one for each image.
        """
        for name, paths, images in (
            ("query_paths", query_paths, query),
            ("gallery_paths", gallery_paths, gallery),
        ):
            if paths is not None and len(paths) != len(images):
                raise ValueError(f"{name}: expected {len(images)} entries, got {len(paths)}")
        itself_start, itself = np.zeros(len(query) + 1, np.int64), np.empty(0, np.int64)
        if query_paths is not None and gallery_paths is not None:
            itself_start, itself = _find_itself(query_paths, gallery_paths)
        return cls._grouped(
            _identities(query), _identities(gallery),
            _array(query.camids), _array(gallery.camids), itself_start, itself,
        )  # fmt: skip

    @classmethod
    def of_records(cls, query: Sequence[ImageRecord], gallery: Sequence[ImageRecord]) -> Relevance:
        """The relevance of gallery images to queries, from two lists."""
        return cls._grouped(
            np.array([record.pid for record in query], np.int64),
            np.array([record.pid for record in gallery], np.int64),
            np.array([record.camid for record in query], np.int64),
            np.array([record.camid for record in gallery], np.int64),
            *_find_itself([record.path for record in query], [record.path for record in gallery]),
        )

    @classmethod
    def _grouped(
        cls,
        query_pids: IntArray,
        gallery_pids: IntArray,
        query_camids: IntArray,
        gallery_camids: IntArray,
        itself_start: IntArray,
        itself: IntArray,
    ) -> Relevance:
        by_pid = np.argsort(gallery_pids, kind="stable")
        start = np.searchsorted(gallery_pids, query_pids, side="left", sorter=by_pid)
        end = np.searchsorted(gallery_pids, query_pids, side="right", sorter=by_pid)
        end[query_pids == JUNK] = start[query_pids == JUNK]
        junk = np.flatnonzero(gallery_pids == JUNK)
        return cls(
            query_pids, gallery_pids, query_camids, gallery_camids,
            by_pid, start, end, junk, itself_start, itself,
        )  # fmt: skip

    def within(self, columns: IntArray) -> Relevance:
        """The relevance for some of the gallery images, by their indices in rising order."""
        place = np.full(len(self.gallery_pids), -1, np.int64)
        place[columns] = np.arange(len(columns))
        inside = place[self.itself] >= 0
        itself_start = np.concatenate([[0], np.cumsum(inside)])[self.itself_start]
        return self._grouped(
            self.query_pids, self.gallery_pids[columns],
            self.query_camids, self.gallery_camids[columns],
            itself_start, place[self.itself[inside]],
        )  # fmt: skip

    def images_of_itself(self, row: int) -> IntArray:
        """Gallery indices of the images that are this row's query image."""
        return self.itself[self.itself_start[row] : self.itself_start[row + 1]]

    def junk_of(self, row: int) -> BoolArray:
        """(G,) whether each gallery image is junk for the query of this row."""
        mask: BoolArray = junk_mask(
            self.query_pids[row], self.query_camids[row],
            self.gallery_pids, self.gallery_camids, self.images_of_itself(row),
        )  # fmt: skip
        return mask

    def verdicts(self, row: int, columns: Sequence[int] | IntArray) -> list[Verdict]:
        """The verdicts on some gallery images for the query of this row."""
        chosen = np.asarray(columns, np.int64)
        junk = junk_mask(
            self.query_pids[row], self.query_camids[row],
            self.gallery_pids[chosen], self.gallery_camids[chosen],
            np.flatnonzero(np.isin(chosen, self.images_of_itself(row))),
        )  # fmt: skip
        same = self.gallery_pids[chosen] == self.query_pids[row]
        return [
            "junk" if is_junk else "same" if is_same else "other"
            for is_junk, is_same in zip(junk, same, strict=True)
        ]

    def matches(self) -> IntArray:
        """Number of matches of each query (Q,)."""
        counts: IntArray = count_matches(
            self.query_pids, self.query_camids, self.gallery_camids,
            self.by_pid, self.start, self.end, self.itself_start, self.itself,
        )  # fmt: skip
        return counts

    def counts(self) -> Counts:
        """Queries with and without a match, junk and distractors."""
        asked = np.isin(self.gallery_pids, self.query_pids)
        return Counts(
            queries=len(self.query_pids),
            with_match=int((self.matches() > 0).sum()),
            gallery=len(self.gallery_pids),
            junk=len(self.junk),
            distractors=int((~asked & (self.gallery_pids != JUNK)).sum()),
        )

    def why_no_match(self) -> str:
        """Why no query has a match, and what may be done about it."""
        queries, gallery = len(self.query_pids), len(self.gallery_pids)
        known = self.query_pids[self.query_pids != JUNK]
        if not queries or not gallery:
            return f"there are {queries:,} queries and {gallery:,} gallery images"
        if not len(known):
            return f"none of {queries:,} queries has an identity (pid)"
        if len(self.junk) == gallery:
            return f"none of {gallery:,} gallery images has an identity (pid)"
        if not np.isin(known, self.gallery_pids).any():
            return (
                f"none of {gallery:,} gallery images has the identity of one of {queries:,} "
                "queries; the pids of query and gallery must be numbered alike"
            )
        if not self._with_itself().matches().any():
            cameras = np.unique(np.concatenate((self.query_camids, self.gallery_camids)))
            seen = (
                f"all images are of camera {cameras[0]}"
                if len(cameras) == 1
                else "every gallery image of a query's identity is of the query's own camera"
            )
            return (
                f"{seen}, and an image of the query's own camera is no match; leave camid empty "
                "if cameras do not matter"
            )
        return "the only gallery image of a query's identity is the query itself"

    def _with_itself(self) -> Relevance:
        return self._grouped(
            self.query_pids, self.gallery_pids, self.query_camids, self.gallery_camids,
            np.zeros_like(self.itself_start), self.itself[:0],
        )  # fmt: skip

    def ignored_text(self, counts: Counts) -> str:
        """How many queries are ignored, as a sentence."""
        other = " in another camera" if (self.query_camids != UNKNOWN_CAMERA).any() else ""
        verb = "has" if counts.ignored == 1 else "have"
        rest = "counts" if counts.ignored == 1 else "count"
        return (
            f"{counts.ignored:,} of {counts.queries:,} queries {verb} no match{other} and {rest} "
            "nowhere"
        )


def _array(ids: Tensor) -> IntArray:
    array: IntArray = np.ascontiguousarray(ids.detach().cpu().numpy())
    return array


def _identities(images: FeatureSet) -> IntArray:
    return _array(torch.where(images.present, images.pids, JUNK))


def _find_itself(
    query_paths: Sequence[str], gallery_paths: Sequence[str]
) -> tuple[IntArray, IntArray]:
    """Offsets (Q + 1,) and gallery indices of the images that have a query's path."""
    asked = [os.path.abspath(path) for path in query_paths]  # noqa: PTH100 - many, and no Path
    places: dict[str, list[int]] = {path: [] for path in asked}
    for place, path in enumerate(gallery_paths):
        found = places.get(os.path.abspath(path))  # noqa: PTH100
        if found is not None:
            found.append(place)
    rows = [places[path] for path in asked]
    itself_start = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=itself_start[1:])
    return itself_start, np.array([place for row in rows for place in row], np.int64)
