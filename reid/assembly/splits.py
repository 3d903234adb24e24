"""Counts and logs the splits of a run's data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from reid.data.datasets.base import SplitCounts
from reid.evaluation.query_gallery import QueryGallery
from reid.structures import ImageRecord

logger = logging.getLogger(__name__)


def count_splits(
    name: str, train: Sequence[ImageRecord], test_sets: Sequence[QueryGallery], version: str = ""
) -> list[dict[str, Any]]:
    """Counts each split: `dataset`, `split`, `images`, `identities`, `cameras`, `version`.

    0 identities mean unlabelled, 0 cameras mean unknown, and an empty version means that the
    dataset has only one.
    """
    splits = [(name, "train", train, version)] if train else []
    for test_set in test_sets:
        splits += [
            (test_set.name, "query", test_set.query, test_set.version),
            (test_set.name, "gallery", test_set.gallery, test_set.version),
        ]
    counted = []
    for dataset, split, records, which in splits:
        counts = SplitCounts.of(records)
        counted.append(
            {
                "dataset": dataset,
                "split": split,
                "images": counts.images,
                "identities": counts.identities,
                "cameras": counts.cameras,
                "version": which,
            }
        )
    return counted


def log_dataset(splits: Sequence[Mapping[str, Any]]) -> None:
    """Logs the table that `count_splits` returned."""
    rows = [
        [
            split["dataset"],
            split["split"],
            f"{split['images']:,}",
            f"{split['identities'] or 'unlabelled'}",
            f"{split['cameras'] or 'unknown'}",
            split["version"],
        ]
        for split in splits
    ]
    headers = ["dataset", "split", "images", "identities", "cameras", "version"]
    aligns = ["left", "left", "right", "right", "right", "left"]
    if not any(row[-1] for row in rows):  # most datasets have one version only
        rows, headers, aligns = [row[:-1] for row in rows], headers[:-1], aligns[:-1]
    logger.info("Data\n%s", tabulate(rows, headers=headers, colalign=aligns))
