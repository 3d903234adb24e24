"""Several DBSCANs on one graph of distances: one gives the clusters, all vote on pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reid.labelling import JaccardDBSCAN
from reid.registry import CLUSTERER
from reid.structures import FeatureSet, ProgressBar, PseudoLabels

if TYPE_CHECKING:
    import scipy.sparse


@CLUSTERER.register()
class EnsembleDBSCAN(JaccardDBSCAN):
    """Jaccard-DBSCAN clusters of the largest eps, with those of smaller ones in `side`.

    Outliers of the largest eps are not trained on. Labels are split by camera, as samplers that
    look for other cameras need it. The other options are those of `JaccardDBSCAN`.

    Args:
        k1: Length of the neighbour lists, the image itself included.
        eps: Largest Jaccard distances of neighbours, ascending; from 0 to below 1.

    Raises:
        ValueError: A number is out of its range.
    """

    fixed_options = ("outliers",)

    def __init__(
        self, k1: int = 30, eps: tuple[float, ...] = (0.5, 0.55, 0.6), **options: Any
    ) -> None:
        if not eps or list(eps) != sorted(set(eps)) or eps[0] <= 0:
            raise ValueError(f"eps: expected numbers above 0, ascending, got {list(eps)}")
        super().__init__(k1, eps=eps[-1], outliers="drop", **options)
        self._smaller = eps[:-1]
        self._votes: dict[str, Tensor] = {}

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters of the largest eps, -1 = outlier."""
        self._votes = {f"{eps:g}": self.clusters_at(distances, eps) for eps in self._smaller}
        return super().find_graph_clusters(distances)

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: There is no image, or a feature is not finite.
        """
        clusters = self.clusters(features, progress)
        labels = PseudoLabels.from_clusters(clusters, features.camids.cpu())
        return replace(labels, side=self._votes)
