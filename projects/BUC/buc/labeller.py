"""BUC's labels: one image a cluster at first, then fewer clusters each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from reid.labelling import ClusteringError, Labeller
from reid.labelling.merging import SingleLinkage, merge_step
from reid.registry import LABELLER, Range
from reid.structures import OUTLIER, FeatureSet, ImageRecord, ProgressBar, PseudoLabels


@LABELLER.register()
class BottomUp(Labeller):
    """Labels that persist: each time, a fixed number of clusters merge (Lin et al., AAAI 2019).

    The first labels are one image a cluster. Each later time, m = int(merge_share * N) clusters
    merge by `SingleLinkage`: the squared distance of the nearest images plus `size_penalty` times
    the numbers of images in both clusters. No image is an outlier, except those that cannot be
    read; these keep their cluster for a time when they can.

    Args:
        merge_share: Clusters that merge each time, as a share of the images.
        size_penalty: lambda, on squared distances as in the published code. The paper adds its
            lambda to the distance itself.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        merge_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.05,
        size_penalty: Annotated[float, Range(0, 1000)] = 0.003,
    ) -> None:
        if not 0 < merge_share < 1 or size_penalty < 0:
            raise ValueError(
                "expected merge_share above 0 and below 1, and size_penalty of 0 or more; got "
                f"{merge_share}, {size_penalty}"
            )
        self._merge_share = merge_share
        self._size_penalty = size_penalty
        self._labels: Tensor | None = None

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        """Labels of the N images.

        Raises:
            ClusteringError: There are too few images, or too few clusters are left to merge.
            ValueError: Features are missing, not finite, or of other images than before.
        """
        if features is None:
            raise ValueError("BottomUp needs the features of the training images")
        count = len(features)
        merges = int(self._merge_share * count)
        if not merges:
            raise ClusteringError(
                f"{self._merge_share:g} of {count:,} images is less than one cluster to merge; "
                f"raise labeller.merge_share to {1 / count:.2g} or more"
            )
        if self._labels is None:
            self._labels = torch.arange(count)
        elif len(self._labels) != count:
            raise ValueError(f"expected the {len(self._labels):,} images of before, got {count:,}")
        else:
            self._labels = self._merged(self._labels, features, merges, progress)
        present = features.present.cpu()
        return PseudoLabels.from_clusters(torch.where(present, self._labels, OUTLIER))

    def _merged(
        self, labels: Tensor, features: FeatureSet, merges: int, progress: ProgressBar | None
    ) -> Tensor:
        rows = features.present.cpu().nonzero()[:, 0]
        numbers, cluster = torch.unique(labels[rows], return_inverse=True)
        if merges >= len(numbers):
            raise ClusteringError(
                f"{len(numbers):,} clusters are left, too few for {merges:,} merges; lower "
                "labeller.merge_share or the stages' REPEAT"
            )
        feature = features.test.cpu()[rows]
        linkage = SingleLinkage(feature, cluster.numpy(), self._size_penalty)
        # A merged cluster has the smallest number of its clusters, also among those without images.
        new = torch.from_numpy(merge_step(linkage, merges, progress))
        first = np.unique(new.numpy(), return_index=True)[1]
        table = torch.arange(int(labels.max()) + 1)
        table[numbers] = numbers[torch.from_numpy(first)][new]
        merged: Tensor = torch.unique(table[labels], return_inverse=True)[1]
        return merged

    def state_dict(self) -> dict[str, Any]:
        """The labels of all images."""
        return {} if self._labels is None else {"labels": self._labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the labels back.

        Raises:
            ValueError: They are no labels.
        """
        labels = state.get("labels")
        if labels is not None and not (
            isinstance(labels, Tensor)
            and labels.ndim == 1
            and labels.dtype == torch.int64
            and bool((labels >= 0).all() and (labels < len(labels)).all())
        ):
            raise ValueError("labels: expected the cluster of each image, from 0")
        self._labels = labels
