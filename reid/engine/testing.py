"""Tests of a model: from a test set to numbers, a table, a picture."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from reid import distributed
from reid.engine.logs import progress_bar
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.extract import Precision, extract_features
from reid.evaluation.plots import draw_similarities
from reid.evaluation.ranking import top_matches
from reid.evaluation.report import ranking_details
from reid.evaluation.visualize import Verdict, draw_ranked_lists
from reid.structures import Batch, FeatureSet, ImageRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestSet:
    """Query and gallery of a dataset.

    Attributes:
        name: For tables.
        query: Images to look for.
        gallery: Images to look in.
        loader: Batches of query and gallery together, in this order, with the test transform.
        flip: Flip-test; see `extract_features`.
        version: Which of several circulating versions was found; empty where there is one only.
        precision: Of the network; see `extract_features`.
        is_validation: Whether it was taken out of the training images, to choose by.
    """

    __test__ = False  # not a pytest class

    name: str
    query: Sequence[ImageRecord]
    gallery: Sequence[ImageRecord]
    loader: Iterable[Batch]
    flip: bool = False
    version: str = ""
    precision: Precision = "fp32"
    is_validation: bool = False

    def features(self, model: nn.Module, device: torch.device) -> tuple[FeatureSet, FeatureSet]:
        """Features of query and gallery."""
        with progress_bar(f"Extracting {self.name}", "img") as progress:
            both = extract_features(
                model,
                self.loader,
                [*self.query, *self.gallery],
                device,
                progress,
                flip=self.flip,
                precision=self.precision,
            )
        return both[: len(self.query)], both[len(self.query) :]


def evaluate(
    model: nn.Module,
    test_set: TestSet,
    evaluator: Evaluator,
    device: torch.device,
    *,
    details: bool = False,
) -> tuple[dict[str, float], dict[str, Any]]:
    """A model on a test set, the same on every process.

    Args:
        model: Gives the features.
        test_set: Query and gallery.
        evaluator: Gives the numbers.
        device: Where the model is.
        details: Whether to look behind the numbers too.

    Returns:
        The evaluator's numbers; and what `ranking_details` gives, or nothing without `details`
        or where the plain ranking finds no match (an evaluator may have its own protocol).
    """
    query, gallery = test_set.features(model, device)
    found = None
    if distributed.is_main():
        with (
            progress_bar(f"Ranking {test_set.name}", "query") as progress,
            distributed.torch_threads_kept(),
        ):
            numbers = evaluator(query, gallery, progress=progress)
            found = numbers, _details(test_set, query, gallery) if details else {}
    return distributed.broadcast_object(found)


def _details(test_set: TestSet, query: FeatureSet, gallery: FeatureSet) -> dict[str, Any]:
    try:
        return ranking_details(query, gallery, [record.path for record in test_set.query])
    except ValueError as error:
        logger.warning("%s: no details of the ranking (%s)", test_set.name, error)
        return {}


def best_evaluation(history: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any]:
    """The first test set's best evaluation of trained weights; the earliest of equals."""
    first = [entry for entry in history if entry["test_set"] == history[0]["test_set"]]
    trained = [entry for entry in first if entry["epoch"]] or first
    return max(trained, key=lambda entry: entry["numbers"][metric])


def summary_table(history: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The results of a training run: before it, at the best epoch, and at the end."""
    best, last = best_evaluation(history, metric)["epoch"], history[-1]["epoch"]
    rows = []
    for name in dict.fromkeys(entry["test_set"] for entry in history):
        for entry in history:
            epoch = entry["epoch"]
            if entry["test_set"] == name and epoch in (0, best, last):
                when = f"after epoch {epoch}" if epoch else "before training"
                mark = " (best)" if epoch == best != last else ""
                rows.append((name, when + mark, entry["numbers"]))
    return results_table(rows)


def results_table(rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    """A table in percent of (test set, weights, numbers)."""
    body = [
        [name, weights, *(f"{100 * number:.1f}" for number in numbers.values())]
        for name, weights, numbers in rows
    ]
    headers = ["test set", "weights", *rows[0][2]]
    return tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)


def draw_matches(
    path: Path,
    test_set: TestSet,
    query: FeatureSet,
    gallery: FeatureSet,
    num_queries: int,
    *,
    keep_junk: bool = False,
) -> None:
    """Draws queries, spread evenly over the test set, with their ten best matches.

    Args:
        path: The PNG to write.
        test_set: The images.
        query: Their features.
        gallery: Their features.
        num_queries: Rows.
        keep_junk: Draw images that the protocol leaves out too, marked as such.

    Raises:
        DataError: An image cannot be read.
    """
    chosen = np.unique(np.linspace(0, len(query) - 1, num_queries).astype(int))
    chosen_query = query[torch.from_numpy(chosen).to(query.pids.device)]
    matches = top_matches(
        chosen_query.global_feat,
        gallery.global_feat,
        chosen_query.pids,
        gallery.pids,
        chosen_query.camids,
        gallery.camids,
        k=10,
        keep_junk=keep_junk,
    )
    asked = [test_set.query[i] for i in chosen]
    draw_ranked_lists(
        path,
        [record.path for record in asked],
        [
            [
                (test_set.gallery[j].path, _verdict(record, test_set.gallery[j]))
                for j in row
                if j >= 0
            ]
            for record, row in zip(asked, matches, strict=True)
        ],
    )


def draw_test_pictures(
    model: nn.Module, test_set: TestSet, device: torch.device, num_queries: int, output_dir: Path
) -> list[Path]:
    """Draws ranked_lists.png and, where there are pairs, similarities.png.

    Args:
        model: Gives the features.
        test_set: The images.
        device: Where the model is.
        num_queries: In ranked_lists.png.
        output_dir: Where to.

    Returns:
        The pictures, on the main process.
    """
    query, gallery = test_set.features(model, device)
    if not distributed.is_main():
        return []
    paths = [output_dir / "ranked_lists.png"]
    draw_matches(paths[0], test_set, query, gallery, num_queries)
    try:
        draw_similarities(output_dir / "similarities.png", query, gallery)
        paths.append(output_dir / "similarities.png")
    except ValueError as error:
        logger.warning("%s: no histogram of similarities (%s)", test_set.name, error)
    return paths


def _verdict(query: ImageRecord, match: ImageRecord) -> Verdict:
    """As the protocol of Market-1501 has it."""
    same = query.pid == match.pid
    if match.pid < 0 or (same and query.camid == match.camid >= 0):
        return "junk"
    return "same" if same else "other"
