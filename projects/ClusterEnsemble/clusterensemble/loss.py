"""Contrast with clusters and with images, whose pairs an ensemble of clusterings weighs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.contrastive import info_nce
from reid.modeling.losses import Temperature
from reid.modeling.memory_losses import InstanceLoss
from reid.registry import LOSS
from reid.structures import OUTLIER, FeatureSet, PseudoLabels


@LOSS.register()
class EnsembleLoss(InstanceLoss):
    """Contrast over clusters and over images, from one memory of images: `cluster`, `instance`.

    A definition of our own; see the project's README. The memory is filled at the start of each
    epoch, with a row for each image; outliers take no part.

    - cluster: InfoNCE over unit vectors c_k = L2(mean of the rows of cluster k).
    - instance: -sum_j (w_j / sum w) log(e_j / (e_j + sum_n e_n)), e = exp(row . f / tau), over the
      images j of the sample's cluster, its own row included, and the most similar images n of other
      clusters. w_j is the share of the clusterings (the labels and their `side`) that put j and
      the sample into one cluster. Without another cluster it is 0.

    A step takes B x M numbers, a few times, and C x D for M images and C clusters; M x M are never
    stored.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        num_negatives: Number of negatives of `instance`; all if there are fewer.
        instance_weight: Weight of `instance`.
        part_weight: Weight of the mean over the parts, if the model has any.

    Raises:
        ValueError: A number is out of its range.
    """

    runs: Tensor

    def __init__(
        self,
        temperature: Temperature = 0.05,
        momentum: float = 0.2,
        num_negatives: int = 50,
        instance_weight: float = 1.0,
        part_weight: float = 0.1,
    ) -> None:
        super().__init__(temperature, momentum, part_weight, fill="epoch")
        if num_negatives < 1 or instance_weight < 0:
            raise ValueError(
                "expected num_negatives of 1 or more and instance_weight of 0 or more, got "
                f"{num_negatives}, {instance_weight}"
            )
        self._num_negatives = num_negatives
        self._instance_weight = instance_weight
        self.register_buffer("runs", torch.zeros(0, 0, dtype=torch.int64), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, and fills the memory.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        super().set_labels(labels, features)
        # Row i is image i, as there are no source domains.
        self.runs = torch.stack([labels.cluster, *labels.side.values()])

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """`cluster` and `instance` (1 + K, B)."""
        rows = self.memory.rows
        sums = rows.new_zeros(len(rows), len(self.label_size) + 1, rows.shape[2])
        # Rows without a label go to a last place, which is cut off.
        place = torch.where(self.row_label == OUTLIER, len(self.label_size), self.row_label)
        centers = F.normalize(sums.index_add_(1, place, rows)[:, :-1], dim=2)
        logits = feature @ centers.transpose(1, 2) / self._temperature
        cluster = info_nce(logits, self.row_label[row].clamp(min=0))
        instance = self._instance_losses(self.memory.similarity(feature), row)
        return {"cluster": cluster, "instance": self._instance_weight * instance}

    def _instance_losses(self, similarity: Tensor, row: Tensor) -> Tensor:
        """`instance` (1 + K, B) of similarities (1 + K, B, M)."""
        logits = similarity / self._temperature
        ours = self.runs[:, row, None]
        votes = ((ours == self.runs[:, None]) & (ours != OUTLIER)).sum(0)
        same = self.row_label[row, None] == self.row_label
        weight = (votes * same).to(logits.dtype)
        other = ~same & (self.row_label != OUTLIER)
        hidden = logits.masked_fill(~other, -torch.inf)
        hardest = hidden.topk(min(self._num_negatives, hidden.shape[2]), 2, sorted=False).values
        # The lowest number, not infinity, whose gradients would be NaN where there is no other.
        lowest = torch.finfo(logits.dtype).min
        negatives = hardest.clamp(min=lowest / 2).logsumexp(2, keepdim=True)
        values = torch.logaddexp(logits, negatives) - logits
        return (weight * values).sum(2) / weight.sum(1).clamp(min=1)
