"""Losses, each by name; their sum is the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.registry import LOSS
from reid.structures import OUTLIER, Batch, Embeddings, FeatureSet, PseudoLabels


class Loss(nn.Module):
    """What is registered in LOSS.

    A loss owns the labels and whatever memory it keeps. Both are derived from the model at the
    start of an epoch, so they are buffers that checkpoints do not hold.

    Attributes:
        epoch: The epoch that is trained, from 0, for losses that begin later than others.
        needs_features: Whether `set_labels` must be given the features of the training images.
    """

    epoch: int = 0
    needs_features: bool = False
    cluster: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cluster", torch.zeros(0, dtype=torch.int64), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, and the features they were made from if needed."""
        self.cluster = labels.cluster

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """Named losses, scalars."""
        raise AssertionError(f"{type(self).__name__} must define forward")


class Criterion(nn.Module):
    """The weighted losses of a list, by name.

    Args:
        losses: One or more.
        weights: One for each.

    Raises:
        ValueError: The numbers of losses and weights differ, or there is none.
    """

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(losses) if weights is None else weights
        if not losses or len(losses) != len(weights):
            raise ValueError(
                f"expected losses, a weight for each; got {len(losses)}, {len(weights)}"
            )
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights)

    @property
    def needs_features(self) -> bool:
        """Whether one of the losses needs features."""
        return any(bool(loss.needs_features) for loss in self.losses)

    def set_epoch(self, epoch: int) -> None:
        """Tells each loss the epoch that is trained, from 0."""
        for loss in self.losses:
            assert isinstance(loss, Loss)
            loss.epoch = epoch

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Hands the labels on to each loss."""
        for loss in self.losses:
            assert isinstance(loss, Loss)
            loss.set_labels(labels, features)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """Named losses times their weights.

        Raises:
            ValueError: Two losses give the same name.
        """
        found: dict[str, Tensor] = {}
        for loss, weight in zip(self.losses, self.weights, strict=True):
            values: dict[str, Tensor] = loss(embeddings, batch)
            doubled = found.keys() & values.keys()
            if doubled:
                raise ValueError(f"criterion: two losses give {', '.join(sorted(doubled))}")
            found.update({name: weight * value for name, value in values.items()})
        return found


@LOSS.register()
class CrossEntropy(Loss):
    """Classification of identities by a linear layer without bias, on the feature after the neck.

    Args:
        embed_dim: D.
        num_classes: Identities of the training set.
        smoothing: Share of the target that is spread over the classes (label smoothing).
        smooth_true_class: Spread it over all C classes (Szegedy et al. 2016; Luo et al. 2019;
            TransReID-SSL); otherwise over the C - 1 others, as fast-reid does.
        init_std: Of the classifier's normal weights at the start.

    Raises:
        ValueError: There is no class, `smoothing` is not in [0, 1), or `init_std` is not above 0.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        smoothing: float = 0.0,
        smooth_true_class: bool = True,
        init_std: float = 0.001,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"needs two identities or more, got {num_classes}; it takes the training set's "
                "identities as classes, which are there with CLUSTERER: null only"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: expected 0 <= smoothing < 1, got {smoothing}")
        if not init_std > 0:
            raise ValueError(f"init_std: expected a number above 0, got {init_std}")
        self._smoothing = smoothing
        self._smooth_true_class = smooth_true_class
        self.classifier = nn.Linear(embed_dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=init_std)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the identities as classes.

        Raises:
            ValueError: There are more or fewer classes than the classifier has.
        """
        if labels.num_clusters != self.classifier.out_features:
            raise ValueError(
                f"CrossEntropy: expected {self.classifier.out_features} classes, got "
                f"{labels.num_clusters}; it needs identities as labels (CLUSTERER: null)"
            )
        super().set_labels(labels, features)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`cross_entropy`, mean over the labelled images; 0 if there are none."""
        logits = self.classifier(embeddings.post_neck)
        target = self.cluster[batch.index]
        loss = smoothed_cross_entropy(
            logits, target, self._smoothing, smooth_true_class=self._smooth_true_class
        )
        return {"cross_entropy": loss}


@LOSS.register()
class Triplet(Loss):
    """Batch-hard triplet loss (Hermans et al., arXiv:1703.07737).

    Args:
        margin: Of the hinge; null: the soft margin, log(1 + exp(.)).
        normalize: Take unit vectors instead of raw features.
        feature: The feature `before` or `after` the neck.

    Raises:
        ValueError: The margin is negative.
    """

    def __init__(
        self,
        margin: float | None = None,
        normalize: bool = False,
        feature: Literal["before", "after"] = "before",
    ) -> None:
        super().__init__()
        if margin is not None and margin < 0:
            raise ValueError(f"margin: expected 0 or more, or null, got {margin}")
        self._margin = margin
        self._normalize = normalize
        self._feature = feature

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`triplet`, mean over the anchors that have a positive and a negative."""
        feature = embeddings.pre_neck if self._feature == "before" else embeddings.post_neck
        feature = feature.float()
        if self._normalize:
            feature = F.normalize(feature, dim=1)
        return {"triplet": batch_hard_triplet(feature, self.cluster[batch.index], self._margin)}


def smoothed_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.0, *, smooth_true_class: bool = True
) -> Tensor:
    """Cross entropy with label smoothing; rows with target -1 are left out.

    Args:
        logits: (B, C).
        target: (B,) int64.
        smoothing: epsilon. The true class gets 1 - epsilon of the target.
        smooth_true_class: epsilon / C on every class, so that the true one has
            1 - epsilon + epsilon / C (Szegedy et al., CVPR 2016); else epsilon / (C - 1) on the
            others alone (fast-reid).

    Returns:
        With `smooth_true_class` the mean over the rows that count; without, their sum over the
        number of those whose loss is not exactly 0, as in fast-reid. 0 if there are none.
    """
    logits = logits.float()
    kept = target != OUTLIER
    if smooth_true_class:
        total = F.cross_entropy(
            logits, target, ignore_index=OUTLIER, label_smoothing=smoothing, reduction="sum"
        )
        return total / kept.sum().clamp(min=1)
    log_prob = F.log_softmax(logits, dim=1)
    others = smoothing / (logits.shape[1] - 1)
    weights = torch.full_like(log_prob, others)
    weights.scatter_(1, target.clamp(min=0)[:, None], 1 - smoothing)
    losses = -(weights * log_prob).sum(1)[kept]
    return losses.sum() / losses.count_nonzero().clamp(min=1)


def hardest_distances(feature: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's distance to the farthest of its label and to the nearest of another.

    In float32 under mixed precision too: half precision loses the small distances.

    Args:
        feature: (B, D) float32.
        label: (B,) int64; -1 = not labelled, neither an anchor nor a positive nor a negative.

    Returns:
        `positive` (B,): Euclidean distance to the farthest image of the same label, itself
        included. `negative` (B,). `valid` (B,): labelled, and a negative exists.
    """
    with torch.autocast(feature.device.type, enabled=False):
        squared = feature.square().sum(1)
        distance = (squared[:, None] + squared - 2 * feature @ feature.T).clamp(min=1e-12).sqrt()
    labelled = label != OUTLIER
    same = label[:, None] == label
    others = ~same & labelled
    positive = distance.masked_fill(~same, -torch.inf).amax(1)
    negative = distance.masked_fill(~others, torch.inf).amin(1)
    return positive, negative, labelled & others.any(1)


def batch_hard_triplet(feature: Tensor, label: Tensor, margin: float | None = None) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., arXiv:1703.07737, eq. 5).

    Args:
        feature: (B, D) float32.
        label: (B,) int64; -1 = left out.
        margin: Of the hinge; None: soft margin.

    Returns:
        Mean over the anchors that have a negative; 0, with a gradient of 0, if there are none.
    """
    positive, negative, valid = hardest_distances(feature, label)
    difference = torch.where(valid, positive - negative, torch.zeros_like(positive))
    loss = F.softplus(difference) if margin is None else F.relu(difference + margin)
    return torch.where(valid, loss, torch.zeros_like(loss)).sum() / valid.sum().clamp(min=1)
