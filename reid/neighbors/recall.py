"""How many of the true neighbours an index finds, measured on the gallery itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reid.neighbors.indexes import Index, Rows
from reid.neighbors.kernels import Floats
from reid.neighbors.similar import most_similar

GOOD_RECALL = 0.95
"""The share of the true neighbours that an index should find; it gets more effort until it does."""

_SAMPLE = 256
_NEIGHBORS = 10
_SAME = 1e-5  # scores of duplicates differ by no more


@dataclass(frozen=True)
class Recall:
    """A measured recall.

    Attributes:
        value: Share of the true neighbours that the index finds, from 0 to 1.
        neighbors: Number of neighbours per vector.
        sample: Number of vectors in the measurement.
    """

    value: float
    neighbors: int
    sample: int

    def __str__(self) -> str:
        return (
            f"recall {self.value:.3f}: of the {self.neighbors} nearest of {self.sample:,} gallery "
            "images, against the exact search"
        )


def tune_index(index: Index, gallery: Floats, target: float = GOOD_RECALL) -> Recall:
    """Sets the smallest effort whose recall reaches `target`, or else the largest effort.

    One half of a sample of the gallery chooses the effort and may miss only half as many
    neighbours as `target` allows; the other half measures the recall. A vector is not its own
    neighbour.

    Args:
        index: Index of the gallery.
        gallery: (N, D), two vectors or more.
        target: Recall, from 0 to 1.

    Raises:
        ValueError: There are fewer than two vectors.
    """
    count = len(gallery)
    if count < 2:
        raise ValueError(f"gallery: expected two vectors or more, got {count}")
    sample = np.random.default_rng(0).choice(count, min(2 * _SAMPLE, count), replace=False)
    neighbors = min(_NEIGHBORS, count - 1)
    choosing, measuring = np.array_split(sample, 2)
    needed = _least_scores(gallery, choosing, neighbors)
    for effort in index.efforts:
        index.effort = effort
        if _recall(index, gallery, choosing, needed, neighbors) >= (1 + target) / 2:
            break
    needed = _least_scores(gallery, measuring, neighbors)
    value = _recall(index, gallery, measuring, needed, neighbors)
    return Recall(value, neighbors, len(measuring))


def _least_scores(gallery: Floats, rows: Rows, neighbors: int) -> Floats:
    """(R,) the score of each row's last true neighbour."""
    scores, found = most_similar(None, gallery[rows], gallery, neighbors + 1)
    return np.array([line[-1] for line in _others(scores, found, rows, neighbors)], np.float32)


def _recall(index: Index, gallery: Floats, rows: Rows, needed: Floats, neighbors: int) -> float:
    """The recall, counted by scores, since equally near vectors are equally good answers."""
    scores, found = most_similar(index, gallery[rows], gallery, neighbors + 1)
    others = _others(scores, found, rows, neighbors)
    near = [int((line >= least - _SAME).sum()) for line, least in zip(others, needed, strict=True)]
    return sum(near) / (neighbors * len(rows))


def _others(scores: Floats, found: Rows, rows: Rows, neighbors: int) -> list[Floats]:
    """The scores of each row's neighbours, without the row itself."""
    return [
        line[places != row][:neighbors]
        for line, places, row in zip(scores, found, rows, strict=True)
    ]
