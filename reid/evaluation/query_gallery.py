"""Test sets of query and gallery images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from reid import distributed
from reid.evaluation.evaluation import AP, Details, Evaluation
from reid.evaluation.extract import ImageSet
from reid.evaluation.ranking import rank
from reid.evaluation.relevance import Relevance
from reid.structures import DataError, FeatureSet, ImageRecord, ProgressBar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryGallery:
    """A test set: query images, and gallery images to find them in.

    Attributes:
        name: For tables.
        query: Images to look for.
        gallery: Images to look in.
        images: Both together, query first.
        version: The version that was loaded, if several circulate; else empty.
        is_validation: Whether it was taken out of the training images, to choose settings.
        is_source: Whether it is of a source domain, so that a network with `DomainBatchNorm` is
            tested with the source's statistics.
    """

    name: str
    query: Sequence[ImageRecord]
    gallery: Sequence[ImageRecord]
    images: ImageSet
    version: str = ""
    is_validation: bool = False
    is_source: bool = False

    @cached_property
    def query_paths(self) -> list[str]:
        """Paths of the queries."""
        return [record.path for record in self.query]

    @cached_property
    def gallery_paths(self) -> list[str]:
        """Paths of the gallery."""
        return [record.path for record in self.gallery]

    def features(
        self, model: nn.Module, device: torch.device, progress: ProgressBar | None = None
    ) -> tuple[FeatureSet, FeatureSet]:
        """Features of query and gallery; see `extract_features`."""
        both = self.images.features(model, device, progress)
        return both[: len(self.query)], both[len(self.query) :]

    def rank(
        self,
        query: FeatureSet,
        gallery: FeatureSet,
        *,
        ap: AP,
        details: Details,
        needs_match: bool = True,
        progress: ProgressBar | None = None,
    ) -> Evaluation:
        """The evaluation of features of these images; see `reid.evaluation.ranking.rank`."""
        return rank(
            query,
            gallery,
            ap=ap,
            details=details,
            query_paths=self.query_paths,
            gallery_paths=self.gallery_paths,
            needs_match=needs_match,
            progress=progress,
        )


def check_query_gallery(
    name: str, query: Sequence[ImageRecord], gallery: Sequence[ImageRecord]
) -> str:
    """Why query and gallery cannot be scored, judged by their lists.

    Warns of queries without a match, which are ignored.

    Args:
        name: Name of the test set.
        query: Images to look for.
        gallery: Images to look in.

    Returns:
        The reason, and what to do; empty if they can be scored.
    """
    relevance = Relevance.of_records(query, gallery)
    counts = relevance.counts()
    if not counts.with_match:
        return f"no query has a match: {relevance.why_no_match()}"
    if counts.ignored and distributed.is_main():
        logger.warning("%s: %s", name, relevance.ignored_text(counts))
    return ""


def usable_test_sets(test_sets: Sequence[QueryGallery]) -> list[QueryGallery]:
    """The test sets that can be scored; warns of each of the others.

    Called before training, so that a bad test set is found before hours of work.

    Raises:
        DataError: There are test sets, but none can be scored.
    """
    usable, reasons = [], []
    for test_set in test_sets:
        reason = check_query_gallery(test_set.name, test_set.query, test_set.gallery)
        if reason:
            reasons.append(f"{test_set.name}: {reason}")
        else:
            usable.append(test_set)
    if reasons and not usable:
        raise DataError("; ".join(reasons))
    for reason in reasons if distributed.is_main() else ():
        logger.warning("%s. This test set is left out", reason)
    return usable
