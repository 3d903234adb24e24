"""The result of an evaluation: features, their ranking, and what was collected with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reid.evaluation.ranking_kernels import FloatArray, IntArray
from reid.evaluation.relevance import Counts, Relevance, Verdict
from reid.structures import FeatureSet

AP = Literal["step", "trapezoid"]
"""`step`: the mean over a query's matches of the precision at the match. `trapezoid`: the mean of
that and the precision one place before (1 before the first place), as the original Market-1501 code
has it."""

EUCLIDEAN = "Euclidean distance"


@dataclass(frozen=True)
class RankingResult:
    """The numbers of a ranking, per query and in total.

    Attributes:
        average_precision: (Q,) from 0 to 1; NaN for queries without a match.
        inverse_negative_penalty: (Q,) number of matches / rank of the hardest match, from 0 to 1
            (Ye et al., *Deep Learning for Person Re-identification*, TPAMI 2021); NaN for queries
            without a match.
        first_match_rank: (Q,) 0-based rank of the first match; -1 for queries without a match.
        ties: (Q,) number of wrong answers exactly as far from the query as one of its matches.
        cmc: (max_rank,) entry k - 1 is the fraction of queries with a match among the first k.
    """

    average_precision: FloatArray
    inverse_negative_penalty: FloatArray
    first_match_rank: IntArray
    ties: IntArray
    cmc: FloatArray

    @property
    def mAP(self) -> float:  # noqa: N802 - the name in the literature
        """Mean average precision over the queries that have a match; NaN where none has one."""
        return _mean(self.average_precision)

    @property
    def mINP(self) -> float:  # noqa: N802 - the name in the literature
        """Mean inverse negative penalty over the queries with a match; NaN where none has one."""
        return _mean(self.inverse_negative_penalty)

    @property
    def num_valid(self) -> int:
        """Number of queries that have a match."""
        return int((self.first_match_rank >= 0).sum())

    def hardest(self, k: int) -> IntArray:
        """The (at most) k queries with the lowest average precision, the lowest first."""
        valid = np.flatnonzero(self.first_match_rank >= 0)
        return valid[np.argsort(self.average_precision[valid], kind="stable")[:k]]

    def rank(self, k: int) -> float:
        """Rank-k: the fraction of queries with a match among the first k.

        A k above the gallery's size means the whole gallery; NaN where no query has a match.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k: expected 1 or more, got {k}")
        if not self.num_valid:
            return math.nan
        return int(((self.first_match_rank >= 0) & (self.first_match_rank < k)).sum()) / (
            self.num_valid
        )


@dataclass(frozen=True)
class CameraPairs:
    """The mAP of the queries of one camera in the gallery images of one camera, for all pairs.

    Attributes:
        query_cameras: (A,) the queries' cameras.
        gallery_cameras: (B,) the gallery's cameras.
        mAP: (A, B); NaN where no query has a match, as within one camera.
    """

    query_cameras: IntArray
    gallery_cameras: IntArray
    mAP: FloatArray  # noqa: N815 - the name in the literature


@dataclass(frozen=True)
class PairSimilarities:
    """How far apart matching pairs and other pairs of a query and a gallery image are.

    Squared Euclidean distances are counted in bins of equal width from 0 to the largest possible
    one: 4 for unit vectors, so that a bin is 4e-6 wide.

    Attributes:
        matching: (bins,) pairs of a query and its match.
        others: (bins,) pairs of a query and a wrong answer.
        scale: Bins for a squared distance of 1.
    """

    matching: IntArray
    others: IntArray
    scale: float

    def true_positive_rates(self, false_positive_rates: Sequence[float]) -> FloatArray:
        """Verification: the share of matching pairs accepted at given shares of other pairs.

        All pairs are compared with one threshold: the largest edge of a bin that accepts no more
        than the given share of the other pairs.

        Args:
            false_positive_rates: From 0 to 1.

        Returns:
            One rate for each of `false_positive_rates`.

        Raises:
            ValueError: A rate is out of its range, or there is no matching or no other pair.
        """
        if not all(0 <= rate <= 1 for rate in false_positive_rates):
            raise ValueError(
                f"false_positive_rates: expected 0 to 1, got {list(false_positive_rates)}"
            )
        accepted, wrong = np.cumsum(self.matching), np.cumsum(self.others)
        self.require_pairs()
        bins = [
            np.searchsorted(wrong, rate * wrong[-1], "right") - 1 for rate in false_positive_rates
        ]
        return np.array([accepted[i] / accepted[-1] if i >= 0 else 0.0 for i in bins])

    def histogram(self, bins: int) -> tuple[IntArray, IntArray, FloatArray]:
        """The pairs by the cosine of their features, for features of unit length.

        Args:
            bins: Number of bins of equal width, far fewer than here.

        Returns:
            Numbers of matching pairs (bins,), of other pairs (bins,), and the edges (bins + 1,) of
            the bins, from cosine -1 to 1.

        Raises:
            ValueError: There is no bin.
        """
        if bins < 1:
            raise ValueError(f"bins: expected 1 or more, got {bins}")
        cosine = 1 - np.arange(len(self.matching)) / self.scale / 2
        place = np.clip(((cosine + 1) / 2 * bins).astype(np.int64), 0, bins - 1)
        counts = [
            np.bincount(place, weights=pairs, minlength=bins).astype(np.int64)
            for pairs in (self.matching, self.others)
        ]
        return counts[0], counts[1], np.linspace(-1, 1, bins + 1)

    def require_pairs(self) -> None:
        """Raises unless there are matching and other pairs.

        Raises:
            ValueError: There is no matching or no other pair.
        """
        matching, others = int(self.matching.sum()), int(self.others.sum())
        if not matching or not others:
            raise ValueError(
                "expected pairs of the same person and of different persons, got "
                f"{matching:,} and {others:,}"
            )


@dataclass(frozen=True)
class RankedLists:
    """The best gallery images of some queries, with their verdicts.

    Equally near images are in the order of the gallery.

    Attributes:
        queries: Rows of the queries.
        without_junk: For each query (gallery index, verdict), best first.
        with_junk: For each query (gallery index, verdict), best first.
    """

    queries: list[int]
    without_junk: list[list[tuple[int, Verdict]]]
    with_junk: list[list[tuple[int, Verdict]]]


@dataclass(frozen=True)
class Details:
    """What to collect beside the ranking, in the same pass over the distances.

    Attributes:
        camera_pairs: The mAP from camera to camera.
        similarities: How far apart matching pairs and other pairs are.
        ranked_lists: Number of queries, spread evenly over all, that get a list of their best
            images.
        list_length: Gallery images in such a list.
    """

    camera_pairs: bool = False
    similarities: bool = False
    ranked_lists: int = 0
    list_length: int = 10


@dataclass(frozen=True)
class Evaluation:
    """Query and gallery, ranked once; all numbers, tables and pictures are made of this.

    Attributes:
        query: Features of the queries.
        gallery: Features of the gallery.
        relevance: Which gallery images are matches and junk.
        ranking: The numbers per query and in total.
        ap: The kind of average precision in `ranking` and `camera_pairs`.
        ranked_by: The kind of distance that the ranking uses, in words.
        details: What was asked for.
        camera_pairs: None if not asked for, or if there are too many cameras.
        similarities: By Euclidean distances, whatever the ranking uses; None: not asked for.
        ranked_lists: None: not asked for.
        query_paths: Paths of the queries' images, if they are known.
        gallery_paths: Paths of the gallery's images, if they are known.
    """

    query: FeatureSet
    gallery: FeatureSet
    relevance: Relevance
    ranking: RankingResult
    ap: AP
    ranked_by: str
    details: Details
    camera_pairs: CameraPairs | None = None
    similarities: PairSimilarities | None = None
    ranked_lists: RankedLists | None = None
    query_paths: Sequence[str] | None = None
    gallery_paths: Sequence[str] | None = None

    @property
    def counts(self) -> Counts:
        """How many queries and gallery images the figures are based on."""
        return self.relevance.counts()

    @property
    def text(self) -> str:
        """How the numbers were computed, in words."""
        return f"AP {self.ap}, {self.ranked_by}"


def _mean(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if len(known) else math.nan
