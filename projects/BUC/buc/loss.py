"""BUC's loss: cross entropy against a memory that is empty at first."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from reid.modeling.losses import Loss, Temperature, smoothed_cross_entropy
from reid.modeling.memories import ProxyMemory
from reid.registry import LOSS, Range
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels


@LOSS.register()
class BUCLoss(Loss):
    """Repelled loss (Lin et al., AAAI 2019, eq. 2 and 3) against a row for each cluster.

    The logits are V e / tau, with e the features after the neck as the head gives them (unit
    vectors, then dropout). All rows are 0 when labels come, so the first loss is log C and its
    gradient 0. The authors' first code filled V with mean features by the numbering of the stage
    before, which let identities leak in; they withdrew it. After the optimizer's step, sample by
    sample: V_y <- L2(mu V_y + (1 - mu) e), so a row's first sample makes it L2(e).

    Args:
        embed_dim: D.
        temperature: tau.
        momentum: Share of a row that an update keeps (mu).

    Attributes:
        memory: V, one bank.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        embed_dim: int,
        temperature: Temperature = 0.1,
        momentum: Annotated[float, Range(0, 1)] = 0.5,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        self._embed_dim = embed_dim
        self._temperature = temperature
        self.memory = ProxyMemory(momentum)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of a stage and empties the memory."""
        super().set_labels(labels, features)
        device = labels.cluster.device
        self.memory.rows = torch.zeros(1, labels.num_clusters, self._embed_dim, device=device)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`repelled`, the mean over the labelled images; 0 if there are none."""
        feature = _trained(embeddings)
        with torch.autocast(feature.device.type, enabled=False):
            logits = self.memory.similarity(feature)[0] / self._temperature
            return {"repelled": smoothed_cross_entropy(logits, self.cluster[batch.index])}

    @torch.no_grad()
    def commit(  # type: ignore[override]  # see `Loss.asks_for`
        self, embeddings: Embeddings, batch: Batch, *, taken: Tensor | None = None
    ) -> None:
        """Moves the memory by the batch."""
        feature = _trained(embeddings)
        with torch.autocast(feature.device.type, enabled=False):
            self.memory.update(self.cluster[batch.index], feature, taken)


def _trained(embeddings: Embeddings) -> Tensor:
    """(1, B, D), in float32."""
    return embeddings.post[:, :1].transpose(0, 1).float()
