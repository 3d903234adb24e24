"""Contrast with several centroids for each cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from reid.modeling.losses import Temperature
from reid.modeling.memory_losses import MemoryLoss
from reid.projects.multicentroid.memory import CentroidMemory
from reid.registry import LOSS
from reid.structures import UNKNOWN_CAMERA, FeatureSet, PseudoLabels

_BLOCK = 2**24  # similarities between centroids at once, 64 MB


@LOSS.register()
class MultiCentroidLoss(MemoryLoss):
    """InfoNCE against chosen centroids of the clusters, and interpolated ones: `contrast`.

    A working definition of ours, made from the abstract of Wu et al., *Multi-Centroid
    Representation Network* (AAAI 2022); the paper's equations are not known to us, so this is not
    its method.

    Each cluster has n centroids. A sample's positive is the centroid of its cluster with the median
    score, entry (n - 1) // 2 from the lowest. Its negatives are the best-scoring centroid of each
    other cluster. Further negatives are interpolated: (c + c') / |c + c'| for each c of the
    highest-scoring negatives, where c' is the centroid nearest to c, of neither c's nor the
    sample's cluster. The choice carries no gradient. An update moves, sample by sample, the nearest
    centroid of the sample's cluster.

    Args:
        temperature: tau.
        momentum: Share of the old centroid that an update keeps.
        num_centroids: n, centroids of each cluster.
        num_interpolated: Negatives that are interpolated; all, if there are fewer.
        part_weight: Weight of the mean over the parts, if the model has any.

    Raises:
        ValueError: A number is out of its range.
    """

    memory: CentroidMemory

    def __init__(
        self,
        temperature: Temperature = 0.05,
        momentum: float = 0.2,
        num_centroids: int = 4,
        num_interpolated: int = 50,
        part_weight: float = 0.1,
    ) -> None:
        super().__init__(temperature, momentum, part_weight)
        if num_interpolated < 0:
            raise ValueError(f"num_interpolated: expected 0 or more, got {num_interpolated}")
        self._num_centroids = num_centroids
        self._num_interpolated = num_interpolated
        self.memory = CentroidMemory(momentum, num_centroids)

    def memory_rows(self, labels: PseudoLabels) -> tuple[Tensor, Tensor]:
        """The clusters."""
        cameras = torch.full((labels.num_clusters,), UNKNOWN_CAMERA, device=labels.cluster.device)
        return labels.cluster, cameras

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch and chooses the first centroids.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        self.memory.draw = self.epoch
        super().set_labels(labels, features)

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """`contrast` (1 + K, B)."""
        scores = self.memory.similarity(feature)  # (M, B, C, n)
        banks, count, clusters, n = scores.shape
        own = row.expand(banks, -1)[..., None]
        mine = scores.gather(2, own[..., None].expand(-1, -1, -1, n))[:, :, 0]
        median = mine.detach().argsort(2)[:, :, (n - 1) // 2, None]
        positive = mine.gather(2, median)
        best = scores.detach().argmax(3, keepdim=True)
        others = scores.gather(3, best)[..., 0].scatter(2, own, -torch.inf)
        top = others.detach().topk(min(self._num_interpolated, clusters), 2)
        interpolated = positive.new_empty(banks, count, 0)
        if top.indices.shape[2]:
            first = top.indices * n + best[..., 0].gather(2, top.indices)
            nearest, cosine = self._neighbours(first, row)
            flat = scores.flatten(2)
            # c and c' are unit vectors, so |c + c'|^2 = 2 + 2 c.c'.
            length = (2 + 2 * cosine).clamp(min=1e-6).sqrt()
            exists = (top.values > -torch.inf) & (cosine > -torch.inf)
            interpolated = (flat.gather(2, first) + flat.gather(2, nearest)) / length
            interpolated = torch.where(exists, interpolated, -torch.inf)
        logits = torch.cat((positive, others, interpolated), 2) / self._temperature
        return {"contrast": logits.logsumexp(2) - logits[..., 0]}

    @torch.no_grad()
    def _neighbours(self, chosen: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centroid of a third cluster for each chosen centroid, and its cosine.

        Similarities to all centroids are computed in blocks of 64 MB.

        Args:
            chosen: (M, B, k) centroids, by cluster * n + number.
            row: (B,) clusters of the samples.

        Returns:
            (M, B, k) int64 and (M, B, k); cosine -inf where there is no third cluster.
        """
        centroids = self.memory.centroids.flatten(1, 2)  # (M, C n, D)
        n = self._num_centroids
        cluster = torch.arange(centroids.shape[1], device=row.device) // n
        step = max(1, _BLOCK // (centroids.shape[1] * chosen.shape[2]))
        values, places = [], []
        for bank, each in zip(centroids, chosen, strict=True):
            for start in range(0, len(row), step):
                part = each[start : start + step]  # (b, k)
                cosine = bank[part] @ bank.T  # (b, k, C n)
                mine = row[start : start + step, None, None] == cluster
                cosine = cosine.masked_fill(mine | (part[..., None] // n == cluster), -torch.inf)
                best = cosine.max(2)
                values.append(best.values)
                places.append(best.indices)
        return torch.cat(places).view_as(chosen), torch.cat(values).view(chosen.shape)
