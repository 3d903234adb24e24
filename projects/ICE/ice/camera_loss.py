"""ICE's camera term: CAP's inter-camera loss with proxies that stay for the epoch."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from reid.modeling.contrastive import Average
from reid.modeling.losses import Temperature
from reid.modeling.memory_losses import ProxyLoss
from reid.registry import LOSS
from reid.structures import FeatureSet, PseudoLabels


@LOSS.register()
class ICECameraLoss(ProxyLoss):
    """A sample against all proxies of its cluster and the hardest others: `camera`.

    Chen et al., *ICE* (ICCV 2021): the inter-camera loss of CAP with fixed proxies. The published
    code normalises them along the wrong axis, V'_pd = V_pd / sqrt(sum_p V_pd^2), for scores, the
    choice of negatives and the loss. Scores then fall as sqrt(D / P): with 10,000 proxies of 2,048
    dimensions it is as if the temperature were 2.2 times as high.

    Args:
        temperature: tau.
        num_negatives: Number of negatives; all other proxies if there are fewer.
        normalize: What has unit length: `dimensions`, each over all proxies, as in the published
            code; or `proxies`, each over its dimensions, as intended.
        average: See `reid.modeling.contrastive.sample_weights`.
        part_weight: Weight of the mean over the parts, if the model has any.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        temperature: Temperature = 0.07,
        num_negatives: int = 50,
        normalize: Literal["dimensions", "proxies"] = "dimensions",
        average: Average = "camera",
        part_weight: float = 0.1,
    ) -> None:
        super().__init__(temperature, 1.0, num_negatives, part_weight, average)
        if normalize not in ("dimensions", "proxies"):
            raise ValueError(f"normalize: expected dimensions or proxies, got {normalize!r}")
        self._normalize = normalize

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch and makes the proxies.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        super().set_labels(labels, features)
        if self._normalize == "dimensions":
            self.memory.rows = F.normalize(self.memory.rows, dim=1)

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """`camera` (1 + K, B)."""
        similarity = self.memory.similarity(feature.detach())
        return {"camera": self.offline_losses(feature, similarity, row)}

    def commit(self, *inputs: Any, taken: Tensor | None = None) -> None:
        """Does nothing: the proxies stay."""
