"""SpCL's loss: contrast of labels whose score is the mean over their images' rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reid.modeling.contrastive import floored_log_softmax, sample_weights
from reid.modeling.losses import Temperature
from reid.modeling.memory_losses import InstanceLoss
from reid.registry import LOSS
from reid.structures import OUTLIER

SourceGradient = Literal["published", "exact"]


@LOSS.register()
class SpCLLoss(InstanceLoss):
    """Unified contrast of a hybrid memory: `contrast`.

    Ge et al., *Self-paced Contrastive Learning* (NeurIPS 2020), equation 3. The memory has a row
    for each image and, with source domains, for each source class; it is filled once, and its rows
    are clustered. The score of a label is the mean of its rows' similarities, divided by tau, not
    normalised again. With p_k = exp s_k / (sum exp s + 1e-6), the loss is -log(p_y + 1e-6), y the
    label of the sample's row. Scores are computed in single precision, and nothing overflows.

    For each bank of the model, a step takes B x (M + C) numbers for M rows and C labels; M x C are
    never stored.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        part_weight: Weight of the mean over the parts, if the model has any.
        source_domains: How many of the joined training sets, from the first on, are sources. The
            means over source samples and over target samples are added.
        source_gradient: With source domains, the rows in the gradient of source samples.
            `published`: as the target samples of the batch will leave them, because the published
            code updates before that gradient. `exact`: as they are before the batch.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        temperature: Temperature = 0.05,
        momentum: float = 0.2,
        part_weight: float = 0.1,
        source_domains: int = 0,
        source_gradient: SourceGradient = "published",
    ) -> None:
        super().__init__(temperature, momentum, part_weight, source_domains=source_domains)
        if source_gradient not in ("published", "exact"):
            raise ValueError(
                f"source_gradient: expected published or exact, got {source_gradient!r}"
            )
        self._late = source_gradient == "published"

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """`contrast` (1 + K, B)."""
        similarity = self.memory.rows @ feature.transpose(1, 2)
        scores = self.label_means(similarity, self.row_label) / self._temperature
        if self.source_classes and self._late:
            scores = scores + self._late_gradient(feature, row) / self._temperature
        label = self.row_label[row].clamp(min=0).expand(len(scores), -1)
        return {"contrast": -floored_log_softmax(scores).gather(2, label[..., None])[..., 0]}

    def _late_gradient(self, feature: Tensor, row: Tensor) -> Tensor:
        """Scores (1 + K, B, C) of 0 that carry the gradient of the rows' coming change."""
        source = row < self.source_classes
        moving, moved = self.memory.moved(torch.where(source, OUTLIER, row), feature)
        repeated = (moving[:, None] == moving).tril(-1).any(1)
        change = (moved - self.memory.rows[:, moving]) * ~repeated[:, None]
        scores = self.label_means(change @ feature.transpose(1, 2), self.row_label[moving])
        return (scores - scores.detach()) * source[:, None]

    def weights(self, row: Tensor) -> Tensor:
        """The weight (B,) of each sample's loss: means over source and over target are added."""
        domain = (row >= self.source_classes).long()
        return sample_weights(row != OUTLIER, domain, "camera")
