"""DBSCAN on k-reciprocal Jaccard distances."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import scipy.sparse
import torch
from torch import Tensor

from reid.labelling.base import FeatureClusterer, Outliers, at_least_one
from reid.labelling.epsilon import choose_eps
from reid.neighbors import Search, dbscan, jaccard_distance, jaccard_memory_mb
from reid.registry import CLUSTERER, shortened
from reid.structures import ProgressBar

logger = logging.getLogger(__name__)

# Above TIE_TOLERANCE, so that the graph stores every distance that DBSCAN may count.
_SLACK = 1e-5


@CLUSTERER.register()
class JaccardDBSCAN(FeatureClusterer):
    """DBSCAN on k-reciprocal Jaccard distances of the global features.

    The pseudo-labels of Ge et al., *Self-paced Contrastive Learning* (NeurIPS 2020), and of most
    work since. Images at a distance of `eps` count as neighbours with a tolerance of 1e-6, so
    that ties do not depend on rounding (`reid.neighbors.TIE_TOLERANCE`). Clusters are not split by
    camera: each is one proxy.

    Args:
        k1: Length of the neighbour lists, the image itself included.
        k2: Rows averaged in the local query expansion.
        eps: Largest Jaccard distance of neighbours, from 0 to below 1; or `auto`: chosen for the
            first features by the silhouette of the clusters (see `choose_eps`), and then kept.
            Chosen anew in each epoch it would fall, because features of clusters become tighter,
            and clusters would break into pieces.
        min_samples: Neighbours that make a core point, the image itself included.
        outliers: `drop`, `nearest` or `singleton`; see `FeatureClusterer`.
        search: `exact`, or `ivf` or `hnsw` for more images than the exact search can take.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        k1: int = 20,
        k2: int = 6,
        eps: float | Literal["auto"] = 0.5,
        min_samples: int = 4,
        outliers: Outliers = "drop",
        search: Search = "exact",
    ) -> None:
        super().__init__(outliers)
        at_least_one(k1=k1, k2=k2, min_samples=min_samples)
        if eps != "auto" and not 0 < eps < 1:
            raise ValueError(f"eps: expected 0 < eps < 1, or auto, got {eps}")
        self._k1 = k1
        self._k2 = k2
        self._eps = eps
        self._chosen: float | None = None
        self._min_samples = min_samples
        self._search: Search = search

    @property
    def choices(self) -> Mapping[str, float]:
        """The eps that `auto` chose; empty before the first clusters, and for a given eps."""
        return {} if self._chosen is None else {"eps": self._chosen}

    @property
    def keeps_state(self) -> bool:
        """Whether clusters depend on earlier ones, as with `auto`."""
        return self._eps == "auto"

    @property
    def min_samples(self) -> int:
        """Neighbours that make a core point, the image itself included."""
        return self._min_samples

    @property
    def largest_distance(self) -> float:
        """The largest distance that a clustering looks at."""
        eps = self._chosen if self._eps == "auto" else self._eps
        return 1.0 if eps is None else eps

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        largest = min(self.largest_distance + _SLACK, 1.0)
        return self.find_graph_clusters(self.distances(features, largest, progress))

    def distances(
        self, features: Tensor, max_distance: float = 1.0, progress: ProgressBar | None = None
    ) -> scipy.sparse.csr_matrix:
        """The Jaccard distances (N, N) that it clusters; see `jaccard_distance`."""
        return jaccard_distance(
            features,
            self._k1,
            self._k2,
            max_distance=max_distance,
            search=self._search,
            progress=progress,
        )

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        if self._eps != "auto":
            return self.clusters_at(distances, self._eps)
        if self._chosen is not None:
            return self.clusters_at(distances, self._chosen)
        found = choose_eps(distances, self._min_samples)
        self._chosen = found.eps
        logger.info(
            "eps %g was chosen by the mean silhouette: %s",
            found.eps,
            ", ".join(f"{eps:g} {value:.3f}" for eps, value in found.silhouettes.items()),
        )
        return torch.from_numpy(found.clusters)

    def clusters_at(self, distances: scipy.sparse.csr_matrix, eps: float) -> Tensor:
        """(N,) clusters of a graph at another eps, -1 = outlier."""
        return torch.from_numpy(dbscan(distances, eps, self._min_samples))

    def state_dict(self) -> dict[str, Any]:
        """The eps that `auto` chose."""
        return {} if self._chosen is None else {"eps": self._chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the eps that `auto` chose.

        Raises:
            ValueError: It is no eps.
        """
        eps = state.get("eps")
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise ValueError(f"eps: expected 0 < eps < 1, got {shortened(eps)}")
        self._chosen = eps

    def memory_mb(self, count: int, dim: int) -> float:
        """About how many MB the Jaccard distances take."""
        return jaccard_memory_mb(count, dim, self._k1, self._k2)

    def how_to_loosen(self) -> str:
        """What to change for fewer outliers."""
        return (
            f"raise {self.config_key}.eps ({self._shown_eps()}) or lower "
            f"{self.config_key}.min_samples ({self._min_samples})"
        )

    def how_to_tighten(self) -> str:
        """What to change for smaller clusters."""
        return f"lower {self.config_key}.eps ({self._shown_eps()})"

    def _shown_eps(self) -> str:
        return str(self._eps) if self._chosen is None else f"auto chose {self._chosen:g}"
