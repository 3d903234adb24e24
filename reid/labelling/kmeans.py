"""k-means through FAISS."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

from reid.labelling.base import ClusteringError, FeatureClusterer, at_least_one
from reid.registry import CLUSTERER
from reid.structures import ProgressBar


@CLUSTERER.register()
class KMeans(FeatureClusterer):
    """k-means on the global features, as FAISS computes it (Johnson et al. 2019).

    It has no outliers: every image is in a cluster. The first centres are random images.

    Args:
        num_clusters: k, at most the number of readable images.
        iterations: Iterations of Lloyd's algorithm.
        seed: Seed of the first centres.
        spherical: Normalise the centres to length 1, so that images are compared by cosine.
        restarts: How often it starts with other centres; the clusters with the smallest distances
            to their centres are taken. MMT was published with 10.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        num_clusters: int,
        iterations: int = 25,
        seed: int = 0,
        spherical: bool = True,
        restarts: int = 1,
    ) -> None:
        super().__init__("drop")
        at_least_one(num_clusters=num_clusters, iterations=iterations, restarts=restarts)
        self._num_clusters = num_clusters
        self._iterations = iterations
        self._seed = seed
        self._spherical = spherical
        self._restarts = restarts

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters.

        Raises:
            ClusteringError: There are fewer images than clusters.
        """
        if len(features) < self._num_clusters:
            raise ClusteringError(
                f"{len(features):,} images are too few for {self._num_clusters:,} clusters: "
                f"{self.how_to_loosen()}"
            )
        rows = np.ascontiguousarray(features.cpu().numpy())
        kmeans = faiss.Kmeans(
            rows.shape[1],
            self._num_clusters,
            niter=self._iterations,
            spherical=self._spherical,
            nredo=self._restarts,
            seed=self._seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rows),
        )
        kmeans.train(rows)
        return torch.from_numpy(kmeans.index.search(rows, 1)[1][:, 0]).long()

    def memory_mb(self, count: int, dim: int) -> float:
        """About how many MB: the centres, their sums, and the assignment of each image."""
        return (8 * dim * self._num_clusters + 16 * count) / 2**20

    def how_to_loosen(self) -> str:
        """What to change for larger clusters; there are no outliers."""
        return f"lower {self.config_key}.num_clusters ({self._num_clusters})"

    def how_to_tighten(self) -> str:
        """What to change for smaller clusters."""
        return f"raise {self.config_key}.num_clusters ({self._num_clusters})"
