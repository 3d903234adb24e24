"""Classifiers of identities behind a bottleneck, one for each bank of the features."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from reid.modeling.heads import Neck
from reid.modeling.losses import Banks, Loss, check_banks, select_banks, smoothed_cross_entropy
from reid.registry import LOSS, Range
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels


class BottleneckClassifier(nn.Sequential):
    """Linear layer to a bottleneck, BatchNorm, dropout, linear layer to the classes; no ReLU.

    PCB's head (Sun et al., ECCV 2018), with the initial weights of its published code. A training
    batch of one image is normalised with the running statistics.

    Args:
        dim: Of the features.
        num_classes: C.
        width: Of the bottleneck.
        dropout: Share of the bottleneck's numbers that are dropped in training.
    """

    def __init__(self, dim: int, num_classes: int, width: int, dropout: float) -> None:
        reduce, norm, classify = nn.Linear(dim, width), Neck(width), nn.Linear(width, num_classes)
        norm.bias.requires_grad_(True)
        nn.init.kaiming_normal_(reduce.weight, mode="fan_out")
        nn.init.normal_(norm.weight, 1.0, 0.02)
        nn.init.normal_(classify.weight, std=0.001)
        nn.init.zeros_(reduce.bias)
        nn.init.zeros_(classify.bias)
        super().__init__(reduce, norm, nn.Dropout(dropout), classify)


@LOSS.register()
class BottleneckCrossEntropy(Loss):
    """Classification of identities, each bank by a `BottleneckClassifier` of its own.

    Args:
        embed_dim: D.
        num_classes: Identities of the training set.
        width: Of the bottlenecks.
        dropout: In the bottlenecks.
        average: Take the mean over the banks; otherwise their sum, as published.
        feature: Whether to classify features `before` or `after` the neck.
        banks: Which features are classified.
        num_parts: K.

    Raises:
        ValueError: There are fewer than two classes, a number is out of its range, or the model has
            no parts.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        width: Annotated[int, Range(1, 16_384)] = 256,
        dropout: Annotated[float, Range(0, 1, below=True)] = 0.5,
        average: bool = False,
        feature: Literal["before", "after"] = "before",
        banks: Banks = "parts",
        num_parts: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"needs two identities or more, got {num_classes}; it takes the training set's "
                "identities as classes, which only the labeller Identities gives (CLUSTERER: null)"
            )
        if width < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"expected a width of 1 or more and 0 <= dropout < 1, got {width}, {dropout}"
            )
        check_banks(banks, num_parts)
        count = {"global": 1, "parts": num_parts, "all": 1 + num_parts}[banks]
        self._num_classes = num_classes
        self._average = average
        self._feature = feature
        self._banks: Banks = banks
        self.classifiers = nn.ModuleList(
            BottleneckClassifier(embed_dim, num_classes, width, dropout) for _ in range(count)
        )

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the identities as classes.

        Raises:
            ValueError: The number of classes is not that of the classifiers.
        """
        if labels.num_clusters != self._num_classes:
            raise ValueError(
                f"BottleneckCrossEntropy: expected {self._num_classes} classes, got "
                f"{labels.num_clusters}; it needs identities as labels (CLUSTERER: null)"
            )
        super().set_labels(labels, features)

    def logits(self, embeddings: Embeddings) -> Tensor:
        """Scores (M, B, C) of the M banks."""
        feature = embeddings.pre if self._feature == "before" else embeddings.post
        banks = select_banks(feature, self._banks).unbind(1)
        scores = [score(bank) for score, bank in zip(self.classifiers, banks, strict=True)]
        return torch.stack(scores)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`cross_entropy`: for each bank the mean over the labelled images, then summed."""
        target = self.cluster[batch.index]
        losses = torch.stack(
            [smoothed_cross_entropy(scores, target) for scores in self.logits(embeddings)]
        )
        return {"cross_entropy": losses.mean() if self._average else losses.sum()}
