"""Classifiers over clusters: a row for each cluster of the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.structures import OUTLIER

Moments = Literal["keep", "drop"]


class ClusterClassifier(nn.Module):
    """A linear layer without bias whose rows are the clusters of the running epoch.

    `refill` replaces the rows at the start of an epoch; then the optimizer trains them. Clusters
    come and go, so the number of rows changes. `weight` stays the same object, so the optimizer
    goes on training it. `Optimization.follow_refills` fits its moments to the new rows.

    A checkpoint holds rows and moments. `fit_classifiers` gives a fresh classifier as many rows as
    the checkpoint has, so that both can be loaded.

    Use it for features of the whole batch, as losses get them: then every process computes the same
    gradient, and DistributedDataParallel, which cannot follow changing sizes, need not average it.

    Args:
        embed_dim: D.
        moments: What happens to the optimizer's moments in a refill. `keep`: those of row i stay
            with row i, and new rows start with 0. `drop`: all start anew, as those of a new
            optimizer.

    Attributes:
        weight: (C, D), C = 0 before the first `refill`.
        moments: As above.
        refilled: Whether rows were replaced since the optimizer last looked.
    """

    def __init__(self, embed_dim: int, moments: Moments = "keep") -> None:
        super().__init__()
        self.moments = moments
        self.refilled = False
        self.weight = nn.Parameter(torch.zeros(0, embed_dim))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D), in the classifier's own precision."""
        with torch.autocast(feature.device.type, enabled=False):
            return F.linear(feature.to(self.weight.dtype), self.weight)

    @torch.no_grad()
    def refill(self, cluster: Tensor, count: int, feature: Tensor) -> None:
        """Every row becomes the normalised mean feature of its cluster.

        Args:
            cluster: (N,) int64 cluster of each image, -1 = none.
            count: C.
            feature: (N, D) unit features of the images.
        """
        labelled = cluster != OUTLIER
        sums = feature.new_zeros((count, feature.shape[1]))
        sums.index_add_(0, cluster[labelled], feature[labelled])
        # The mean and the sum have the same direction.
        self._replace(F.normalize(sums, dim=1))
        self.refilled = True

    def fit(self, rows: object) -> None:
        """Takes the number of rows from a checkpoint; other things than (C, D) are ignored."""
        if (
            isinstance(rows, Tensor)
            and rows.ndim == 2
            and rows.shape[1] == self.weight.shape[1]
            and rows.is_contiguous()  # then the file really holds that many numbers
        ):
            self._replace(self.weight.new_zeros(rows.shape))

    def _replace(self, rows: Tensor) -> None:
        self.weight.grad = None  # it may have another shape
        self.weight.data = rows.to(self.weight)


def classifiers_of(module: nn.Module) -> Iterator[tuple[str, ClusterClassifier]]:
    """The classifiers over clusters in a module, with their names."""
    for name, part in module.named_modules():
        if isinstance(part, ClusterClassifier):
            yield name, part


def fit_classifiers(module: nn.Module, state: object) -> None:
    """Gives a module's classifiers as many rows as those in a checkpoint.

    Args:
        module: Changed in place.
        state: The module's entry in the checkpoint; need not be checked yet.
    """
    if isinstance(state, Mapping):
        rows: Mapping[Any, object] = state
        for name, part in classifiers_of(module):
            part.fit(rows.get(f"{name}.weight" if name else "weight"))
