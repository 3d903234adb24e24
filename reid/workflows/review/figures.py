"""Figures of a model from the answers so far, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reid.evaluation.evaluators import Evaluator
from reid.evaluation.ranking import rank
from reid.structures import FeatureSet

FEWEST = 10
"""Fewest persons, or sampled images, for an interval: with fewer it would be too narrow."""
_DRAWS = 2000
_BLOCK = 250
_Z = 1.959964  # 95 % of a normal distribution

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: From 0 to 1.
        low: Of the 95 % interval; None: there is too little to say.
        high: Of the interval.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap(values: Floats, groups: npt.NDArray[np.int64]) -> Estimate:
    """The mean of some values, with a 95 % interval by the bootstrap over groups.

    Values of one group depend on each other: queries of one person succeed and fail together. So we
    resample whole groups with replacement, as many as there are, and take the mean of their values.
    The interval reaches from the 2.5th to the 97.5th percentile of 2,000 such means
    (Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, chapters 8 and 13).

    Args:
        values: (Q,) finite.
        groups: (Q,) of each value; any numbers.

    Raises:
        ValueError: There is no value.
    """
    if not len(values):
        raise ValueError("values: expected one or more")
    inverse = np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(inverse, weights=values)
    sizes = np.bincount(inverse).astype(np.float64)
    value, count = float(values.mean()), len(sums)
    if count < FEWEST:
        return Estimate(value)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(0, _DRAWS, _BLOCK):
        times = rng.multinomial(count, np.full(count, 1 / count), size=_BLOCK)
        means.append((times @ sums) / (times @ sizes))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def share(hits: int, total: int) -> Estimate:
    """A share with its 95 % interval by Wilson's score, which holds near 0 and 1 too.

    Wilson, *Probable Inference, the Law of Succession, and Statistical Inference* (JASA 1927). It
    needs random, independent samples.

    Raises:
        ValueError: There are no samples, or more hits than samples.
    """
    if not 0 <= hits <= total or not total:
        raise ValueError(f"expected 0 to {total} hits of 1 or more, got {hits}")
    part = hits / total
    if total < FEWEST:
        return Estimate(part)
    scale = 1 + _Z**2 / total
    middle = (part + _Z**2 / (2 * total)) / scale
    reach = _Z / scale * math.sqrt(part * (1 - part) / total + _Z**2 / (4 * total**2))
    return Estimate(part, max(0.0, middle - reach), min(1.0, middle + reach))


@dataclass(frozen=True)
class LabelledFigures:
    """Figures on the labelled images, as `--eval-only` computes them on the list.

    Attributes:
        mAP: Mean average precision.
        rank1: Rank-1.
        queries: With a match.
        persons: Of these queries.
        gallery: Images.
        why: Why there are none; then the figures are None.
    """

    mAP: Estimate | None = None  # noqa: N815 - the name in the literature
    rank1: Estimate | None = None
    queries: int = 0
    persons: int = 0
    gallery: int = 0
    why: str = ""


def labelled_figures(
    query: FeatureSet,
    gallery: FeatureSet,
    query_paths: Sequence[str],
    gallery_paths: Sequence[str],
    evaluator: Evaluator,
) -> LabelledFigures:
    """MAP and Rank-1 of labelled images, with the evaluator's re-ranking or expansion, if any.

    Args:
        query: With identities.
        gallery: With identities.
        query_paths: Of the images.
        gallery_paths: Of the images: an image is not its own match.
        evaluator: Of the run's tests.
    """
    if not len(query):
        return LabelledFigures(why="no person is labelled in two cameras and chosen for testing")
    try:
        evaluation = evaluator.rank_again(
            rank(
                query, gallery, ap=evaluator.ap,
                query_paths=query_paths, gallery_paths=gallery_paths,
            )
        )  # fmt: skip
    except ValueError as error:
        return LabelledFigures(why=str(error))
    ranking = evaluation.ranking
    valid = ranking.first_match_rank >= 0
    persons = query.pids.numpy()[valid]
    return LabelledFigures(
        bootstrap(ranking.average_precision[valid], persons),
        bootstrap((ranking.first_match_rank[valid] == 0).astype(np.float64), persons),
        int(valid.sum()),
        len(np.unique(persons)),
        len(gallery),
    )


@dataclass(frozen=True)
class RandomFigures:
    """Figures from randomly sampled images, each compared with all images.

    Attributes:
        best_is_right: Share of the images whose most similar image of another camera shows the same
            person: at most Rank-1, since some persons are in no other camera.
        rank1: The same share among images with a match in the first places: at least Rank-1, since
            other images may have a match further down.
        mAP: Mean average precision of the first places, of images with a match there: usually above
            the mAP, since matches further down are not seen.
        answered: Images that were answered.
        with_match: Answered images with a match in the first places.
        skipped: Images that the person skipped; they do not count.
        junk: Images that are junk; they do not count.
    """

    best_is_right: Estimate | None
    rank1: Estimate | None
    mAP: Estimate | None  # noqa: N815 - the name in the literature
    answered: int
    with_match: int
    skipped: int
    junk: int


def random_figures(
    lists: Sequence[Sequence[bool]], skipped: int = 0, junk: int = 0
) -> RandomFigures:
    """Figures of judged lists.

    Args:
        lists: Of each image, whether the first places, best first, show the same person.
        skipped: Number of skipped images.
        junk: Number of junk images.
    """
    hits = [bool(judged) and judged[0] for judged in lists]
    found = [judged for judged in lists if any(judged)]
    precision = np.array([_average_precision(judged) for judged in found])
    return RandomFigures(
        share(sum(hits), len(lists)) if lists else None,
        share(sum(hits), len(found)) if found else None,
        bootstrap(precision, np.arange(len(found))) if found else None,
        len(lists),
        len(found),
        skipped,
        junk,
    )


def _average_precision(judged: Sequence[bool]) -> float:
    places = np.flatnonzero(judged) + 1
    return float((np.arange(1, len(places) + 1) / places).mean())
