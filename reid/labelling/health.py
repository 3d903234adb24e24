"""Statistics that show whether an epoch's clusters are good."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from torch import Tensor

from reid.structures import OUTLIER, UNLABELLED, FeatureSet, PseudoLabels

_SILHOUETTE_SAMPLE = 2000


def cluster_statistics(
    labels: PseudoLabels,
    pids: Tensor,
    features: FeatureSet | None = None,
    last_clusters: Tensor | None = None,
) -> dict[str, float]:
    """Statistics that show whether an epoch's labels are good.

    Args:
        labels: Labels of N images.
        pids: (N,) identities for comparison, -1 = unknown.
        features: Features of the N images.
        last_clusters: (N,) clusters of the last epoch, -1 = outlier.

    Returns:
        `clusters`, `proxies`, `outliers`, `images/cluster`, `largest` (images in the largest
        cluster) and `cross-camera` (share of the clusters that have several cameras; without
        features, 0 if clusters are not split by camera). With features, `silhouette` of a sample of
        at most 2,000 clustered images (Rousseeuw 1987). With the last clusters, `agreement`: the
        adjusted Rand index over the images clustered in both. Over the clustered images whose
        identity is known, if there are any, `purity`: the share that has its cluster's most
        frequent identity, `ARI`: the adjusted Rand index (Hubert & Arabie 1985), and `NMI`:
        normalised mutual information.

    Raises:
        ValueError: An argument has another number of images than the labels.
    """
    for name, given in (("pids", pids), ("features", features), ("last_clusters", last_clusters)):
        if given is not None and len(given) != len(labels):
            raise ValueError(f"{name}: expected those of {len(labels)} images, got {len(given)}")
    cluster, pids = labels.cluster.cpu(), pids.cpu()
    kept = cluster != OUTLIER
    sizes = torch.bincount(cluster[kept], minlength=1)
    cameras = _cameras_of_clusters(labels, features)
    numbers: dict[str, float] = {
        "clusters": labels.num_clusters,
        "proxies": labels.num_proxies,
        "outliers": labels.num_outliers,
        "images/cluster": int(kept.sum()) / max(labels.num_clusters, 1),
        "largest": int(sizes.max()),
        "cross-camera": int((cameras > 1).sum()) / max(labels.num_clusters, 1),
    }
    if features is not None:
        silhouette = _silhouette(cluster, features)
        if silhouette is not None:
            numbers["silhouette"] = silhouette
    if last_clusters is not None:
        before = last_clusters.cpu()
        both = kept & (before != OUTLIER)
        if bool(both.any()):
            numbers["agreement"] = _rand(before[both], cluster[both])
    known = kept & (pids != UNLABELLED)
    if bool(known.any()):
        numbers |= _against_identities(cluster[known], pids[known])
    return numbers


def _cameras_of_clusters(labels: PseudoLabels, features: FeatureSet | None) -> Tensor:
    """The number of cameras of each cluster, which not all labels tell; those of images do."""
    if features is None:
        return torch.bincount(labels.proxy_to_cluster.cpu(), minlength=1)
    pairs = torch.stack((labels.cluster.cpu(), features.camids.cpu()))
    clustered = torch.unique(pairs[:, pairs[0] != OUTLIER], dim=1)
    return torch.bincount(clustered[0], minlength=1)


def _against_identities(cluster: Tensor, pids: Tensor) -> dict[str, float]:
    """`purity`, `ARI` and `NMI` of clusters (M,) against identities (M,)."""
    pairs, counts = torch.unique(torch.stack((cluster, pids)), dim=1, return_counts=True)
    largest = torch.zeros(int(cluster.max()) + 1, dtype=counts.dtype)
    largest.scatter_reduce_(0, pairs[0], counts, "amax")
    return {
        "purity": int(largest.sum()) / len(cluster),
        "ARI": _rand(pids, cluster),
        "NMI": float(normalized_mutual_info_score(pids.numpy(), cluster.numpy())),
    }


def _silhouette(cluster: Tensor, features: FeatureSet) -> float | None:
    """Mean silhouette of a sample of the clustered images; None if it is not defined."""
    sample = (cluster != OUTLIER).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    sample = sample[torch.randperm(len(sample), generator=generator)[:_SILHOUETTE_SAMPLE]]
    chosen = cluster[sample].numpy()
    if not 1 < len(np.unique(chosen)) < len(chosen):
        return None
    rows = features.test[sample.to(features.test.device)]
    return float(silhouette_score(rows.cpu().numpy(), chosen))


def _rand(one: Tensor, other: Tensor) -> float:
    return float(adjusted_rand_score(one.numpy(), other.numpy()))
