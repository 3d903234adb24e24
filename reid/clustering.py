"""Clusterers: features become pseudo-labels."""

from __future__ import annotations

from typing import Protocol

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from reid.neighbors import dbscan, jaccard_distance
from reid.registry import CLUSTERER
from reid.structures import OUTLIER, UNLABELLED, FeatureSet, ProgressBar, PseudoLabels


class ClusteringError(ValueError):
    """The features give no usable clusters; says what to change."""


class Clusterer(Protocol):
    """What is registered in CLUSTERER."""

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: There is no cluster.
        """


@CLUSTERER.register()
class JaccardDBSCAN:
    """DBSCAN on k-reciprocal Jaccard distances of the global features.

    The pseudo-labels of Ge et al., *Self-paced Contrastive Learning* (NeurIPS 2020), and of most
    work since. Images at a distance of `eps` count as neighbours with a tolerance of 1e-6, so
    that ties do not depend on rounding (`reid.neighbors.TIE_TOLERANCE`). Clusters are not split by
    camera: each is one proxy.

    Args:
        k1: Length of the neighbour lists, the image itself included.
        k2: Rows averaged in the local query expansion.
        eps: Largest Jaccard distance of neighbours, from 0 to below 1.
        min_samples: Neighbours that make a core point, the image itself included.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, k1: int = 20, k2: int = 6, eps: float = 0.5, min_samples: int = 4) -> None:
        for name, value in (("k1", k1), ("k2", k2), ("min_samples", min_samples)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if not 0 < eps < 1:
            raise ValueError(f"eps: expected 0 < eps < 1, got {eps}")
        self._k1 = k1
        self._k2 = k2
        self._eps = eps
        self._min_samples = min_samples

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: There is no cluster.
        """
        return PseudoLabels.from_clusters(self.clusters(features, progress))

    def clusters(self, features: FeatureSet, progress: ProgressBar | None = None) -> Tensor:
        """(N,) clusters, -1 = outlier.

        Raises:
            ClusteringError: There is no cluster.
        """
        distances = jaccard_distance(
            features.global_feat,
            self._k1,
            self._k2,
            max_distance=min(self._eps + 1e-5, 1.0),  # above eps + the tolerance for ties
            progress=progress,
        )
        clusters = torch.from_numpy(dbscan(distances, self._eps, self._min_samples))
        if bool((clusters == OUTLIER).all()):
            raise ClusteringError(
                f"no cluster: none of {len(clusters)} images has {self._min_samples} neighbours "
                f"(itself included) within a Jaccard distance of eps = {self._eps}; raise "
                "clusterer.eps, lower clusterer.min_samples, or start from better weights "
                "(model.backbone_weights)"
            )
        return clusters


def cluster_statistics(labels: PseudoLabels, pids: Tensor) -> dict[str, float]:
    """Numbers that tell whether an epoch's labels are any good.

    Args:
        labels: Of N images.
        pids: (N,) identities for comparison, -1 = unknown.

    Returns:
        `clusters`, `proxies`, `outliers` and `images/cluster`; and, over the clustered images whose
        identity is known, if there are any, `purity`: the share that has its cluster's most
        frequent identity, and `ARI`: the adjusted Rand index (Hubert & Arabie 1985).
    """
    cluster, pids = labels.cluster.cpu(), pids.cpu()
    kept = cluster != OUTLIER
    numbers = {
        "clusters": labels.num_clusters,
        "proxies": labels.num_proxies,
        "outliers": labels.num_outliers,
        "images/cluster": int(kept.sum()) / max(labels.num_clusters, 1),
    }
    known = kept & (pids != UNLABELLED)
    if bool(known.any()):
        pairs, counts = torch.unique(
            torch.stack((cluster[known], pids[known])), dim=1, return_counts=True
        )
        largest = torch.zeros(labels.num_clusters, dtype=counts.dtype)
        largest.scatter_reduce_(0, pairs[0], counts, "amax")
        numbers["purity"] = int(largest.sum()) / int(known.sum())
        numbers["ARI"] = float(adjusted_rand_score(pids[known].numpy(), cluster[known].numpy()))
    return numbers
