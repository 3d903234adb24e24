"""Clusters that pass SpCL's self-paced test."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reid.labelling import JaccardDBSCAN, number_outliers
from reid.projects.spcl.reliability import self_paced_labels
from reid.registry import CLUSTERER
from reid.structures import OUTLIER, FeatureSet, ProgressBar, PseudoLabels

if TYPE_CHECKING:
    import scipy.sparse

logger = logging.getLogger(__name__)


@CLUSTERER.register()
class SelfPacedDBSCAN(JaccardDBSCAN):
    """Jaccard-DBSCAN clusters whose unreliable images become labels of one image (SpCL).

    Ge et al., *Self-paced Contrastive Learning* (NeurIPS 2020). DBSCAN runs three times on one
    graph of distances; see `self_paced_labels`. Every image has a label, also those that DBSCAN
    leaves out. Labels are split by camera, as samplers that look for other cameras need it. If all
    images are left out, each is a label of its own, with a warning.

    The other options are those of `JaccardDBSCAN`. Checkpoints hold theta.

    Args:
        k1: Length of the neighbour lists, the image itself included.
        eps: Largest Jaccard distance of neighbours, from 0 to below 1.
        eps_gap: The tighter and the looser eps are this far from `eps`.

    Raises:
        ValueError: A number is out of its range.
    """

    fixed_options = ("outliers",)

    def __init__(
        self, k1: int = 30, eps: float = 0.6, eps_gap: float = 0.02, **options: Any
    ) -> None:
        super().__init__(k1, eps=eps, outliers="singleton", **options)
        if not 0 < eps_gap < min(eps, 1 - eps):
            raise ValueError(
                "eps_gap: expected a number above 0 with eps - eps_gap above 0 and eps + eps_gap "
                f"below 1, got {eps_gap} with eps {eps}"
            )
        self._tight, self._middle, self._loose = eps - eps_gap, eps, eps + eps_gap
        self._threshold: float | None = None
        self._counts: dict[str, float] = {}

    @property
    def choices(self) -> Mapping[str, float]:
        """Of the last labels: theta, images that DBSCAN left out, and images that failed the test.

        Empty before the first labels.
        """
        return self._counts

    @property
    def keeps_state(self) -> bool:
        """True: theta."""
        return True

    @property
    def largest_distance(self) -> float:
        """The largest distance that a clustering looks at."""
        return self._loose

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) labels that passed the test; each other image has a label of its own."""
        middle, tight, loose = (
            self.clusters_at(distances, eps) for eps in (self._middle, self._tight, self._loose)
        )
        left_out = int((middle == OUTLIER).sum())
        if left_out > 0.9 * len(middle):
            logger.warning(
                "DBSCAN left out %s of %s images, each of which is now a label of its own: %s",
                f"{left_out:,}",
                f"{len(middle):,}",
                self.how_to_loosen(),
            )
        for run in (middle, tight, loose):
            number_outliers(run)
        tested = self_paced_labels(middle, tight, loose, self._threshold)
        self._threshold = tested.threshold
        size = torch.bincount(middle)[middle]
        dissolved = int(((tested.label != middle) & (size > 1)).sum())
        self._counts = {"left_out": left_out, "dissolved": dissolved}
        if self._threshold is not None:
            self._counts["theta"] = self._threshold
        return tested.label

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ValueError: There is no image, or a feature is not finite.
        """
        return PseudoLabels.from_clusters(self.clusters(features, progress), features.camids.cpu())

    def state_dict(self) -> dict[str, Any]:
        """Theta."""
        return {} if self._threshold is None else {"threshold": self._threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores theta.

        Raises:
            ValueError: It is no number from 0 to 1.
        """
        threshold = state.get("threshold")
        if threshold is not None and not (isinstance(threshold, float) and 0 <= threshold <= 1):
            raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold!r}")
        self._threshold = threshold
