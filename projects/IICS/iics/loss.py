"""IICS's cross entropy: classifiers of clusters with necks of their own, by camera or one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.losses import Loss
from reid.registry import LOSS, Range
from reid.structures import OUTLIER, Batch, Embeddings, FeatureSet, PseudoLabels

_EPS, _MOMENTUM = 1e-5, 0.1  # of BatchNorm


@LOSS.register()
class ClusterCrossEntropy(Loss):
    """Cross entropy over clusters, with BatchNorm (bias 0) and a linear layer without bias.

    Xuan & Zhang, *Intra-Inter Camera Similarity for Unsupervised Person Re-Identification* (CVPR
    2021). Stage 1: each camera has a head of its own, which normalises that camera's images and
    knows its clusters; the loss is the sum over cameras of the means over their images. Stage 2:
    one head. A head's rows beyond its clusters stay and count in the softmax, as in the published
    code.

    Features are those before the model's neck; computed in float32 under mixed precision too. A
    head that sees a single image normalises it with its running statistics, which do not move.

    Args:
        embed_dim: D.
        num_classes: Rows of all heads, as the labeller knows them before training.
        num_cameras: Cameras of the training images, the unknown one included.
        by_camera: A head for each camera.
        exact_classes: Rows beyond a head's clusters do not count in the softmax, as where clusters
            are made by a threshold, and the number of rows is only an upper bound.
        init_std: Standard deviation of the classifiers' normal weights at the start.

    Attributes:
        weight: (rows, D) the classifiers, one after the other.

    Raises:
        ValueError: The labeller does not tell the number of classes.
    """

    head_of_cluster: Tensor
    row_of_cluster: Tensor
    head_of_row: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        num_cameras: int = 1,
        by_camera: bool = False,
        exact_classes: bool = False,
        init_std: Annotated[float, Range(0, 1e3, above=True)] = 0.001,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                "needs a labeller that knows the number of classes before training, such as "
                "IntraCamera or InterCamera"
            )
        heads = num_cameras if by_camera else 1
        self._by_camera = by_camera
        self._exact_classes = exact_classes
        self._rows_per_head = 0 if exact_classes else num_classes // heads
        self.neck_weight = nn.Parameter(torch.ones(heads, embed_dim))
        self.weight = nn.Parameter(torch.empty(num_classes, embed_dim))
        nn.init.normal_(self.weight, std=init_std)
        self.register_buffer("running_mean", torch.zeros(heads, embed_dim))
        self.register_buffer("running_var", torch.ones(heads, embed_dim))
        # With the classifiers in checkpoints: the next stage asks for their scores.
        self.register_buffer("head_of_row", self._even_rows())
        for name in ("head_of_cluster", "row_of_cluster"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the clusters as classes, of one camera each if heads are by camera.

        Raises:
            ValueError: A cluster has images of several cameras though heads are by camera, or there
                are more clusters than rows.
        """
        super().set_labels(labels, features)
        count, device = labels.num_clusters, self.weight.device
        heads = torch.zeros(count, dtype=torch.int64)
        if self._by_camera:
            if labels.num_proxies != count:
                raise ValueError("ClusterCrossEntropy: BY_CAMERA needs clusters of one camera each")
            heads = torch.unique(labels.proxy_to_camera.cpu(), return_inverse=True)[1]
        sizes = torch.bincount(heads, minlength=len(self.neck_weight))
        first = sizes.cumsum(0) - sizes
        order = torch.argsort(heads, stable=True)
        row = torch.empty_like(heads)
        row[order] = torch.arange(count) - first[heads[order]]  # in its head
        if self._rows_per_head:
            rows = self._even_rows()
            start = self._rows_per_head * torch.arange(len(sizes))
            room = self._rows_per_head
        else:
            rows = torch.full((len(self.weight),), len(sizes))
            rows[:count] = heads[order]
            start, room = first, len(self.weight)
        if len(sizes) > len(self.neck_weight) or int(sizes.max()) > room or count > len(rows):
            raise ValueError(
                f"ClusterCrossEntropy: {len(self.neck_weight)} heads with {len(self.weight)} rows "
                f"do not hold {count} clusters of {len(sizes)} cameras"
            )
        self.head_of_cluster = heads.to(device)
        self.row_of_cluster = (start[heads] + row).to(device)
        self.head_of_row = rows.to(device)

    def _even_rows(self) -> Tensor:
        """The head of each row, if all heads have as many rows."""
        return torch.arange(len(self.weight)) // max(1, self._rows_per_head)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`cross_entropy`; outliers are left out."""
        cluster = self.cluster[batch.index]
        labelled = cluster != OUTLIER
        head = self.head_of_cluster[cluster.clamp(min=0)]
        with torch.autocast(self.weight.device.type, enabled=False):
            feature = embeddings.pre[:, 0].float()
            counts, mean, variance = self._statistics(feature, head, labelled)
            scale = torch.rsqrt(variance + _EPS) * self.neck_weight
            logits = F.linear((feature - mean[head]) * scale[head], self.weight)
        logits = logits.masked_fill(self.head_of_row != head[:, None], -torch.inf)
        losses = F.cross_entropy(
            logits, self.row_of_cluster[cluster.clamp(min=0)], reduction="none"
        )
        means = torch.where(labelled, losses, 0) / counts.clamp(min=1)[head]
        return {"cross_entropy": means.sum()}

    @torch.no_grad()
    def commit(  # type: ignore[override]
        self, embeddings: Embeddings, batch: Batch, taken: Tensor | None = None
    ) -> None:
        """Moves the running statistics of the heads that saw several images."""
        cluster = self.cluster[batch.index]
        labelled = cluster != OUTLIER
        head = self.head_of_cluster[cluster.clamp(min=0)]
        feature = embeddings.pre[:, 0].float()
        with torch.autocast(self.weight.device.type, enabled=False):
            counts, mean, variance = self._statistics(feature, head, labelled)
        moves = counts > 1 if taken is None else (counts > 1) & taken
        share = _MOMENTUM * moves[:, None]
        self.running_mean.lerp_(mean, share)
        unbiased = variance * (counts / (counts - 1).clamp(min=1))[:, None]
        self.running_var.lerp_(unbiased, share)

    def _statistics(
        self, feature: Tensor, head: Tensor, labelled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each head: its labelled images (heads,), their mean and variance (heads, D)."""
        shares = F.one_hot(head, len(self.neck_weight)).to(feature) * labelled[:, None]
        counts = shares.sum(0)
        size, several = counts.clamp(min=1)[:, None], (counts > 1)[:, None]
        mean = torch.where(several, shares.T @ feature / size, self.running_mean)
        squares = (feature - mean[head]).square()
        variance = torch.where(several, shares.T @ squares / size, self.running_var)
        return counts, mean, variance

    @torch.no_grad()
    def probabilities(self, feature: Tensor) -> Iterator[Tensor]:
        """Each head's softmax (N, its rows) of features (N, D), with its running statistics.

        Args:
            feature: Before the neck, not normalised.
        """
        for head, neck in enumerate(self.neck_weight):
            scale = neck * torch.rsqrt(self.running_var[head] + _EPS)
            rows = self.weight[self.head_of_row == head]
            if len(rows):
                normalised = (feature.float() - self.running_mean[head]) * scale
                yield F.linear(normalised, rows).softmax(1)
