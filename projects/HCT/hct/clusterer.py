"""HCT's clusters: counted steps of average linkage from single images."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from reid.labelling import ClusteringError, FeatureClusterer
from reid.labelling.merging import AverageLinkage, merge_step
from reid.registry import CLUSTERER, Range
from reid.structures import ProgressBar


@CLUSTERER.register()
class HierarchicalClusterer(FeatureClusterer):
    """Steps of counted merges from one image a cluster (Zeng et al., CVPR 2020).

    In each step, m = int(merge_share * N) clusters merge by `AverageLinkage`, the mean Euclidean
    distance of their images. There are no outliers.

    Args:
        merge_share: Clusters that merge in a step, as a share of the images.
        steps: Number of steps.

    Raises:
        ValueError: A number is out of its range, or no cluster would be left.
    """

    def __init__(
        self,
        merge_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.07,
        steps: Annotated[int, Range(1, 100_000)] = 13,
    ) -> None:
        super().__init__("drop")
        if not 0 < merge_share < 1 or steps < 1 or merge_share * steps >= 1:
            raise ValueError(
                "expected steps of 1 or more, and merge_share above 0 and below 1 / steps; got "
                f"{steps}, {merge_share}"
            )
        self._merge_share = merge_share
        self._steps = steps

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters.

        Raises:
            ClusteringError: There are too few images.
        """
        count = len(features)
        merges = int(self._merge_share * count)
        if not merges:
            raise ClusteringError(
                f"{self._merge_share:g} of {count:,} images is less than one cluster to merge; "
                f"raise {self.config_key}.merge_share to {1 / count:.2g} or more, with fewer steps"
            )
        cluster = np.arange(count)
        for _ in range(self._steps):
            cluster = merge_step(AverageLinkage(features, cluster), merges, progress)[cluster]
        return torch.from_numpy(cluster)

    def memory_mb(self, count: int, dim: int) -> float:
        """About how many MB: three copies of the features, neighbour lists and blocks."""
        return (12 * count * dim + 16 * 12 * count) / 2**20 + 200

    def how_to_loosen(self) -> str:
        """What to change for larger clusters; there are no outliers."""
        return f"raise {self.config_key}.steps ({self._steps})"

    def how_to_tighten(self) -> str:
        """What to change for smaller clusters."""
        return f"lower {self.config_key}.steps ({self._steps})"
