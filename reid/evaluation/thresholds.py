"""From which similarity two pictures count as the same person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from tabulate import tabulate

from reid.checking import Range
from reid.evaluation.evaluation import PairSimilarities
from reid.evaluation.ranking import pair_similarities
from reid.structures import FeatureSet, ProgressBar

Source = Literal["pairs", "clusters"]
"""Where the identities come from: labels, or clusters of the model's own features."""

_MILLION = 1_000_000
_RATES = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
"""False matches per million pairs, from 1 to 500,000."""
_RECOMMENDED = 100
_FEWEST_FALSE = 10  # with fewer false matches, a rate is a guess
_SAID = {
    "pairs": "from labelled pairs",
    "clusters": "from clusters, since nothing is labelled: clusters come from the same features, "
    "so the true figures are worse; label some pairs to know them",
}

Pairs = Annotated[int, Range(1, 2**63 - 1)]


@dataclass(frozen=True)
class ThresholdRow:
    """The errors of a threshold.

    Attributes:
        similarity: Cosine from which two pictures count as the same person.
        false_per_million: How many of a million pairs of different persons count as the same.
        found: The share of the pairs of the same person that count as the same, from 0 to 1.
    """

    similarity: Annotated[float, Range(-1, 1)]
    false_per_million: Annotated[float, Range(0, _MILLION)]
    found: Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Thresholds:
    """A table of thresholds, and the data it was measured on.

    Attributes:
        source: Whether the identities come from labels or from clusters.
        data: Which images, in words.
        same_pairs: Number of compared pairs of one person; pairs of one known camera do not count.
        other_pairs: Number of compared pairs of two persons.
        rows: From the strictest to the loosest.

    Raises:
        ValueError: There is no row, or they are in another order.
    """

    source: Source
    data: str
    same_pairs: Pairs
    other_pairs: Pairs
    rows: list[ThresholdRow]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows: expected one threshold or more, got none")
        for place, (one, other) in enumerate(pairwise(self.rows), 1):
            if (
                one.similarity < other.similarity
                or one.false_per_million >= other.false_per_million
            ):
                raise ValueError(
                    f"rows[{place}]: expected a similarity of at most {one.similarity:g} and more "
                    f"than {one.false_per_million:g} false matches per million, as rows go from "
                    f"strict to loose, got {other.similarity:g} and {other.false_per_million:g}"
                )

    @property
    def recommended(self) -> float:
        """The similarity at 100 false matches per million pairs, or at the fewest measured."""
        return self.at(max(_RECOMMENDED, self.rows[0].false_per_million))

    def at(self, false_per_million: float) -> float:
        """The loosest measured threshold with at most this many false matches.

        Raises:
            ValueError: There are too few pairs of different persons to measure such a low rate.
        """
        allowed = [row for row in self.rows if row.false_per_million <= false_per_million]
        if not allowed:
            raise ValueError(
                f"{false_per_million:g} false matches per million pairs: expected "
                f"{self.rows[0].false_per_million:g} or more, since {self.other_pairs:,} pairs of "
                f"different persons ({self.data}) are too few to measure a lower rate"
            )
        return allowed[-1].similarity

    def false_per_million(self, similarity: float) -> float | None:
        """An upper bound of the pairs, of a million of different persons, that are this similar.

        None: the similarity is below the loosest threshold of the table.
        """
        return next(
            (row.false_per_million for row in self.rows if similarity >= row.similarity), None
        )

    def __str__(self) -> str:
        shown = [row for row in self.rows if _is_power_of_ten(row.false_per_million)] or self.rows
        table = tabulate(
            [
                [f"{row.similarity:.4f}", f"{row.false_per_million:,.0f}", f"{row.found:.1%}"]
                for row in shown
            ],
            headers=["similarity from", "false matches per million pairs", "found"],
            colalign=["right", "right", "right"],
            disable_numparse=True,
        )
        return (
            f"Same person or not, {_SAID[self.source]}\n"
            f"{self.data}: {self.same_pairs:,} pairs of one person, {self.other_pairs:,} of two\n"
            f"{table}"
        )


def measure_thresholds(
    query: FeatureSet,
    gallery: FeatureSet,
    data: str,
    source: Source,
    *,
    query_paths: Sequence[str] | None = None,
    gallery_paths: Sequence[str] | None = None,
    progress: ProgressBar | None = None,
) -> Thresholds:
    """Thresholds from all pairs of a query and a gallery image, compared in blocks.

    Pairs of one person in one known camera do not count: they are often neighbouring frames, and
    more similar than the matches of a search. Images without an identity do not count. A rate has
    a row only if it was measured with ten false matches or more.

    Args:
        query: Q images.
        gallery: G images; it may be `query` itself. Then each pair counts once.
        data: Which images, in words.
        source: Where their identities come from.
        query_paths: Q paths; see `Relevance.of`.
        gallery_paths: G paths.
        progress: Called with (images done, Q).

    Raises:
        ValueError: There is no pair of one person, there are too few pairs of two persons, or a
            feature is not finite.
    """
    both = query is gallery
    if both and query_paths is None:  # an image is not its own match
        query_paths = gallery_paths = [str(row) for row in range(len(query))]
    known = query.pids >= 0
    if not bool(known.all()):
        rows = known.nonzero()[:, 0]
        query = query[rows]
        if query_paths is not None:
            query_paths = [query_paths[row] for row in rows.tolist()]
    pairs = pair_similarities(query, gallery, query_paths, gallery_paths, progress)
    pairs.require_pairs()
    times = 2 if both else 1  # the matrix has each pair twice
    same, other = int(pairs.matching.sum()) // times, int(pairs.others.sum()) // times
    return Thresholds(source, data, same, other, _rows(pairs, other))


def _rows(pairs: PairSimilarities, other_pairs: int) -> list[ThresholdRow]:
    """The measurable rows.

    Raises:
        ValueError: There is none.
    """
    rates = [rate for rate in _RATES if rate * other_pairs >= _FEWEST_FALSE * _MILLION]
    accepted, wrong = np.cumsum(pairs.matching), np.cumsum(pairs.others)
    rows: list[ThresholdRow] = []
    for rate in rates:
        place = int(np.searchsorted(wrong, rate / _MILLION * wrong[-1], "right")) - 1
        if place < 0:
            continue  # even the strictest threshold lets more pairs through
        # Bins are of squared distance, which is 2 - 2 * cosine.
        similarity = max(1 - (place + 1) / pairs.scale / 2, -1.0)
        found = float(accepted[place] / accepted[-1])
        rows.append(ThresholdRow(similarity, float(rate), found))
    if not rows:
        raise ValueError(
            f"expected {_FEWEST_FALSE * _MILLION // _RATES[-1]} pairs of different persons or more "
            f"that are not exactly alike, got {other_pairs:,}"
        )
    return rows


def _is_power_of_ten(rate: float) -> bool:
    return f"{rate:.0f}".strip("0") == "1"
