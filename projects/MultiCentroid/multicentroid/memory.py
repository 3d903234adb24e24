"""A memory with several rows for each cluster."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.memories import ProxyMemory
from reid.structures import OUTLIER, FeatureSet


class CentroidMemory(ProxyMemory):
    """n unit vectors, the centroids, for each of C clusters.

    Args:
        momentum: Share of the old centroid that an update keeps.
        num_centroids: n.

    Attributes:
        rows: (1 + K, C, n D): the centroids of a cluster side by side.
        draw: Seed of the images that `reset` chooses.

    Raises:
        ValueError: The momentum is not in [0, 1], or n is below 1.
    """

    def __init__(self, momentum: float, num_centroids: int) -> None:
        super().__init__(momentum)
        if num_centroids < 1:
            raise ValueError(f"num_centroids: expected 1 or more, got {num_centroids}")
        self._num_centroids = num_centroids
        self.draw = 0

    @property
    def centroids(self) -> Tensor:
        """(1 + K, C, n, D), a view of the rows."""
        banks, count, size = self.rows.shape
        return self.rows.view(banks, count, self._num_centroids, size // self._num_centroids)

    def reset(self, row: Tensor, num_rows: int, features: FeatureSet) -> None:
        """The centroids become features of random images of their clusters.

        Clusters with fewer than n images take some more than once. Every process chooses the same.

        Args:
            row: (N,) cluster of each image, -1 = none.
            num_rows: C.
            features: Features of the N images.
        """
        generator = torch.Generator().manual_seed(self.draw)
        clustered = (row.cpu() != OUTLIER).nonzero()[:, 0]
        clustered = clustered[torch.randperm(len(clustered), generator=generator)]
        cluster = row.cpu()[clustered]
        clustered = clustered[cluster.argsort(stable=True)]
        size = torch.bincount(cluster, minlength=num_rows)[:, None]
        again = torch.rand(num_rows, self._num_centroids, generator=generator) * size
        slot = torch.arange(self._num_centroids)
        place = torch.where(size >= self._num_centroids, slot, again.long())
        image = clustered[(size.cumsum(0) - size) + place]  # (C, n)
        unit = features.unit[image.to(features.unit.device)]  # (C, n, 1 + K, D)
        self.rows = unit.permute(2, 0, 1, 3).flatten(2).contiguous()

    def similarity(self, feature: Tensor) -> Tensor:
        """Dot products (1 + K, B, C, n) of features (1 + K, B, D) with every centroid."""
        flat = feature @ self.centroids.flatten(1, 2).transpose(1, 2)
        return flat.view(*flat.shape[:2], -1, self._num_centroids)

    def _move(self, old: Tensor, feature: Tensor) -> Tensor:
        """Moves the centroid that is nearest to the feature.

        Args:
            old: (1 + K, B, n D) centroids of each sample's cluster.
            feature: (1 + K, B, D).
        """
        centroids = old.reshape(*old.shape[:2], self._num_centroids, -1)
        nearest = torch.einsum("mbnd,mbd->mbn", centroids, feature).argmax(2)
        moved = super()._move(
            centroids.gather(2, nearest[..., None, None].expand_as(centroids[:, :, :1]))[:, :, 0],
            feature,
        )
        chosen = F.one_hot(nearest, self._num_centroids).bool()[..., None]
        return torch.where(chosen, moved[:, :, None], centroids).flatten(2)
