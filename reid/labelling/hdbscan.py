"""HDBSCAN through scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import scipy.sparse
import sklearn.cluster
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from reid.labelling.base import FeatureClusterer, Outliers, at_least_one
from reid.registry import CLUSTERER
from reid.structures import OUTLIER, ProgressBar


@CLUSTERER.register()
class HDBSCAN(FeatureClusterer):
    """HDBSCAN (Campello et al., PAKDD 2013) on the global features, as scikit-learn computes it.

    Its memory grows with N, its time with N^2 on one core: use it for some ten thousand images.
    Ctrl-C works only after scikit-learn has finished.

    Args:
        min_cluster_size: Images that make a cluster.
        min_samples: Neighbours in the core distance, the image itself included.
        outliers: `drop`, `nearest` or `singleton`; see `FeatureClusterer`.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self, min_cluster_size: int = 4, min_samples: int = 4, outliers: Outliers = "drop"
    ) -> None:
        super().__init__(outliers)
        if min_cluster_size < 2:
            raise ValueError(f"min_cluster_size: expected 2 or more, got {min_cluster_size}")
        at_least_one(min_samples=min_samples)
        self._min_cluster_size = min_cluster_size
        self._min_samples = min_samples

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        if len(features) < max(self._min_cluster_size, self._min_samples, 2):
            return torch.full((len(features),), OUTLIER)
        clusterer = sklearn.cluster.HDBSCAN(
            min_cluster_size=self._min_cluster_size,
            min_samples=self._min_samples,
            algorithm="ball_tree",
            copy=True,
        )
        return torch.from_numpy(clusterer.fit_predict(features.cpu().numpy())).long()

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """Clusters (N,), -1 = outlier; pairs that the graph does not store have distance 1."""
        count = distances.shape[0]
        if count < max(self._min_cluster_size, self._min_samples, 2):
            return torch.full((count,), OUTLIER)
        clusterer = sklearn.cluster.HDBSCAN(
            min_cluster_size=self._min_cluster_size,
            min_samples=self._min_samples,
            metric="precomputed",
            copy=True,
        )
        joined = _joined_graph(distances, self._min_samples)
        return torch.from_numpy(clusterer.fit_predict(joined)).long()

    def memory_mb(self, count: int, dim: int) -> float:
        """About how many MB: a copy of the features in double precision, and the tree."""
        return count * (8 * dim + 160) / 2**20

    def how_to_loosen(self) -> str:
        """What to change for fewer outliers."""
        return (
            f"lower {self.config_key}.min_cluster_size ({self._min_cluster_size}) or "
            f"{self.config_key}.min_samples ({self._min_samples})"
        )

    def how_to_tighten(self) -> str:
        """What to change for smaller clusters."""
        return f"lower {self.config_key}.min_cluster_size ({self._min_cluster_size})"


def _joined_graph(distances: scipy.sparse.csr_matrix, least: int) -> scipy.sparse.csr_matrix:
    """The graph made connected, with at least `least` entries a row.

    Pairs that are not stored have distance 1, so storing some of them changes nothing. Distances of
    0 become 1e-12, since scipy's spanning trees treat a 0 as no link.
    """
    count = distances.shape[0]
    part_of = connected_components(distances, directed=False)[1]
    first = np.unique(part_of, return_index=True)[1]
    pairs = {(int(a), int(b)) for a, b in itertools.pairwise(first)}
    stored = np.diff(distances.indptr)
    for i in np.flatnonzero(stored < least).tolist():
        own = set(distances.indices[distances.indptr[i] : distances.indptr[i + 1]].tolist())
        others = [j for j in range(min(count, 2 * least)) if j != i and j not in own]
        pairs.update((min(i, j), max(i, j)) for j in others[: least - stored[i]])
    entries = distances.tocoo()
    present = set(zip(entries.row.tolist(), entries.col.tolist(), strict=True)) if pairs else set()
    added = np.array(sorted(pairs - present), np.int64).reshape(-1, 2)
    rows = np.concatenate((entries.row, added[:, 0], added[:, 1]))
    columns = np.concatenate((entries.col, added[:, 1], added[:, 0]))
    data = np.concatenate((np.maximum(entries.data, 1e-12), np.ones(2 * len(added))))
    return scipy.sparse.csr_matrix((data.astype(np.float64), (rows, columns)), distances.shape)
