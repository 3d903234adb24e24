"""Average-linkage clustering along a graph."""

from __future__ import annotations

import heapq

import numpy as np
import scipy.sparse
import sklearn.cluster
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from reid.labelling.base import FeatureClusterer, Outliers, at_least_one
from reid.neighbors import Labels, jaccard_distance, jaccard_memory_mb
from reid.registry import CLUSTERER
from reid.structures import OUTLIER, ProgressBar


@CLUSTERER.register()
class Agglomerative(FeatureClusterer):
    """Average-linkage clustering of the global features along the Jaccard graph.

    scikit-learn computes it with a connectivity constraint: two clusters are merged only if some
    k-reciprocal Jaccard distance between them is below 1, so memory grows with N. On a ready graph
    the distance of two clusters is the mean over their pairs of images (UPGMA), with 1 for pairs
    that the graph does not store; clusters without a stored pair are never merged.

    Args:
        distance_threshold: Clusters further apart, by mean Euclidean distance of unit features
            (0 to 2) or mean distance in the graph (0 to 1), are not merged.
        min_cluster_size: Smaller clusters are outliers.
        k1: Length of the neighbour lists, the image itself included.
        k2: Rows averaged in the local query expansion.
        outliers: `drop`, `nearest` or `singleton`; see `FeatureClusterer`.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        distance_threshold: float = 0.8,
        min_cluster_size: int = 2,
        k1: int = 20,
        k2: int = 6,
        outliers: Outliers = "drop",
    ) -> None:
        super().__init__(outliers)
        if not 0 < distance_threshold <= 2:
            raise ValueError(
                f"distance_threshold: expected above 0 and at most 2, got {distance_threshold}"
            )
        at_least_one(min_cluster_size=min_cluster_size, k1=k1, k2=k2)
        self._distance_threshold = distance_threshold
        self._min_cluster_size = min_cluster_size
        self._k1 = k1
        self._k2 = k2

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        graph = jaccard_distance(features, self._k1, self._k2, progress=progress)
        components, part_of = connected_components(graph, directed=False)
        rows = features.cpu().numpy()
        found = np.full(len(rows), OUTLIER)
        order = np.argsort(part_of, kind="stable")
        first = 0
        # part by part: scikit-learn would compute all pairs between the parts to join them
        for part in np.split(order, np.cumsum(np.bincount(part_of, minlength=components))[:-1]):
            labels = np.zeros(len(part), np.int64)
            if len(part) > 1:
                links = graph[part][:, part]
                links.data[:] = 1  # scikit-learn drops links of distance 0
                labels = sklearn.cluster.AgglomerativeClustering(
                    n_clusters=None,
                    distance_threshold=self._distance_threshold,
                    linkage="average",
                    connectivity=links,
                ).fit_predict(rows[part])
            large = np.bincount(labels)[labels] >= self._min_cluster_size
            found[part[large]] = first + labels[large]
            first += int(labels.max()) + 1
        return torch.from_numpy(found)

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters by the mean distance of their pairs in the graph, -1 = outlier."""
        labels = _average_linkage(distances, self._distance_threshold)
        sizes = np.bincount(labels)
        return torch.from_numpy(np.where(sizes[labels] >= self._min_cluster_size, labels, OUTLIER))

    def memory_mb(self, count: int, dim: int) -> float:
        """About how many MB: 1.6 kB a link, as measured in the worst case, without clear groups."""
        links = min(count, self._k1 * self._k1 * self._k2 / 2)
        return jaccard_memory_mb(count, dim, self._k1, self._k2) + count * links * 1600 / 2**20

    def how_to_loosen(self) -> str:
        """What to change for fewer outliers."""
        return (
            f"raise {self.config_key}.distance_threshold ({self._distance_threshold}) or lower "
            f"{self.config_key}.min_cluster_size ({self._min_cluster_size})"
        )

    def how_to_tighten(self) -> str:
        """What to change for smaller clusters."""
        return f"lower {self.config_key}.distance_threshold ({self._distance_threshold})"


def _average_linkage(distances: scipy.sparse.csr_matrix, threshold: float) -> Labels:
    """Clusters (N,) from 0 by UPGMA on a sparse graph; distances that are not stored are 1.

    The sums of 1 - distance over the pairs of two clusters add up when clusters merge, so only sums
    above 0 are stored. Equal distances are merged in the order of the images.
    """
    count = distances.shape[0]
    entries = distances.tocoo()
    sums: list[dict[int, float]] = [{} for _ in range(count)]
    for i, j, d in zip(
        entries.row.tolist(), entries.col.tolist(), entries.data.tolist(), strict=True
    ):
        if i != j and d < 1:
            sums[i][j] = 1 - d
    sizes = [1] * count
    parent = list(range(count))
    heap = [(1 - s, i, j) for i, row in enumerate(sums) for j, s in row.items() if i < j]
    heapq.heapify(heap)
    while heap and heap[0][0] <= threshold:
        distance, i, j = heapq.heappop(heap)
        if parent[i] != i or parent[j] != j:
            continue
        if distance != 1 - sums[i][j] / (sizes[i] * sizes[j]):
            continue  # outdated: one of the clusters was merged since
        parent[j] = i
        sizes[i] += sizes[j]
        del sums[i][j], sums[j][i]
        for k, s in sums[j].items():
            del sums[k][j]
            sums[i][k] = sums[i].get(k, 0.0) + s
            sums[k][i] = sums[i][k]
        sums[j] = {}
        for k, s in sums[i].items():
            heapq.heappush(heap, (1 - s / (sizes[i] * sizes[k]), min(i, k), max(i, k)))
    for i in range(count):
        parent[i] = parent[parent[i]]  # parents have smaller numbers: this one is final
    found: Labels = np.unique(parent, return_inverse=True)[1]
    return found
