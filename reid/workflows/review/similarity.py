"""How likely two images show the same person, by how alike their features are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

Floats = npt.NDArray[np.float64]

_PRIOR_WEIGHT = 5.0
"""The total weight of all cluster pairs on each side, in answers."""


class SameProbability:
    """A logistic curve over cosine similarities, fitted to answers and, weakly, to clusters.

    As Platt, *Probabilistic Outputs for Support Vector Machines* (1999), fits a curve to scores.
    Clusters give the first guess: near pairs inside a cluster count as the same person, near pairs
    of two clusters as different, and all of them together as five answers of each kind.

    Args:
        inside: (A,) similarities of near pairs inside clusters.
        between: (B,) of near pairs of two clusters.
        judged: (J,) similarities of judged pairs.
        same: (J,) whether these show the same person.
    """

    def __init__(
        self,
        inside: Floats,
        between: Floats,
        judged: Sequence[float] = (),
        same: Sequence[bool] = (),
    ) -> None:
        values = np.concatenate((inside, between, np.asarray(judged, np.float64)))
        answers = np.concatenate(
            (np.ones(len(inside)), np.zeros(len(between)), np.asarray(same, np.float64))
        )
        weights = np.concatenate(
            (
                np.full(len(inside), _PRIOR_WEIGHT / max(len(inside), 1)),
                np.full(len(between), _PRIOR_WEIGHT / max(len(between), 1)),
                np.ones(len(judged)),
            )
        )
        self._curve: LogisticRegression | None = None
        self._middle, self._scale = 0.0, 1.0
        if len(values):
            self._middle = float(np.average(values, weights=weights))
            spread = float(np.sqrt(np.average((values - self._middle) ** 2, weights=weights)))
            self._scale = spread or 1.0
        if len(np.unique(answers)) == 2:
            scaled = (values - self._middle) / self._scale
            self._curve = LogisticRegression().fit(scaled[:, None], answers, weights)

    def __call__(self, similarity: Floats) -> Floats:
        """(n,) probabilities, for similarities (n,); 0.5 at the mean where nothing is known."""
        scaled = (np.asarray(similarity, np.float64) - self._middle) / self._scale
        if self._curve is None:
            return 1 / (1 + np.exp(-scaled))
        found: Floats = self._curve.predict_proba(scaled[:, None])[:, 1]
        return found

    @property
    def even(self) -> float:
        """The similarity at which both answers are equally likely.

        The curve is symmetric around it, so doubt falls with the distance from it.
        """
        if self._curve is None:
            return self._middle
        slope = float(self._curve.coef_[0, 0])
        if slope <= 0:  # the answers contradict the similarities
            return self._middle
        return self._middle - self._scale * float(self._curve.intercept_[0]) / slope
