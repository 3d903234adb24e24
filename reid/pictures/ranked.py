"""Pictures of an evaluation: queries with their best matches, similarities of pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from reid.evaluation.evaluation import Evaluation, RankedLists
from reid.pictures.plots import draw_similarities
from reid.pictures.sheets import draw_ranked_lists

logger = logging.getLogger(__name__)


def draw_matches(
    path: Path,
    lists: RankedLists,
    query_paths: Sequence[str],
    gallery_paths: Sequence[str],
    *,
    keep_junk: bool = False,
) -> None:
    """Draws queries with their best matches.

    Args:
        path: The PNG to write.
        lists: The queries and their matches.
        query_paths: Paths of all queries' images.
        gallery_paths: Paths of all gallery images.
        keep_junk: Draw images that the protocol leaves out too, marked as such.

    Raises:
        DataError: An image cannot be read.
    """
    rows = lists.with_junk if keep_junk else lists.without_junk
    draw_ranked_lists(
        path,
        [query_paths[row] for row in lists.queries],
        [[(gallery_paths[column], verdict) for column, verdict in row] for row in rows],
    )


def draw_evaluation(
    evaluation: Evaluation, name: str, output_dir: Path, suffix: str = ""
) -> list[Path]:
    """Draws ranked_lists.png and, where there are pairs to compare, similarities.png.

    Args:
        evaluation: With paths, ranked lists and similarities.
        name: Name of the test set, for messages.
        output_dir: The folder to write to.
        suffix: Added to the names of the files.

    Returns:
        The paths of the pictures.

    Raises:
        ValueError: The evaluation lacks paths, ranked lists or similarities.
        DataError: An image cannot be read.
    """
    lists, similarities = evaluation.ranked_lists, evaluation.similarities
    if (
        lists is None
        or similarities is None
        or evaluation.query_paths is None
        or evaluation.gallery_paths is None
    ):
        raise ValueError("evaluation: expected one with paths, ranked lists and similarities")
    paths = [output_dir / f"ranked_lists{suffix}.png"]
    draw_matches(paths[0], lists, evaluation.query_paths, evaluation.gallery_paths)
    try:
        histogram = output_dir / f"similarities{suffix}.png"
        draw_similarities(histogram, similarities)
        paths.append(histogram)
    except ValueError as error:
        logger.warning("%s: no histogram of similarities (%s)", name, error)
    return paths
