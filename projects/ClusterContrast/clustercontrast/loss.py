"""Cluster Contrast's loss: InfoNCE over a memory of clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from reid.modeling.contrastive import info_nce
from reid.modeling.losses import Temperature
from reid.modeling.memories import MemoryDtype, Update
from reid.modeling.memory_losses import MemoryLoss
from reid.registry import LOSS
from reid.structures import UNKNOWN_CAMERA, PseudoLabels


@LOSS.register()
class ClusterContrastLoss(MemoryLoss):
    """InfoNCE over a memory of clusters, without cameras: `contrast`.

    Dai et al., *Cluster Contrast for Unsupervised Person Re-Identification* (ACCV 2022); with the
    hard update it is also the unsupervised stage of TransReID-SSL. A cluster has one row even if it
    is split by camera. The published code trains ResNets with `update: sequential` and
    a momentum of 0.1, the ViT with `hard` and 0.2.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        update: `sequential` or `hard`; see `ProxyMemory`.
        part_weight: Weight of the mean over the parts, if the model has any.
        memory_dtype: `bf16` stores the memory in half the space; see `ProxyMemory`.

    Raises:
        ValueError: A number is out of its range.
    """

    normalizes = True  # as in the published module

    def __init__(
        self,
        temperature: Temperature = 0.05,
        momentum: float = 0.1,
        update: Update = "sequential",
        part_weight: float = 0.1,
        memory_dtype: MemoryDtype = "fp32",
    ) -> None:
        super().__init__(temperature, momentum, part_weight, update, memory_dtype=memory_dtype)

    def memory_rows(self, labels: PseudoLabels) -> tuple[Tensor, Tensor]:
        """The clusters."""
        cameras = torch.full((labels.num_clusters,), UNKNOWN_CAMERA, device=labels.cluster.device)
        return labels.cluster, cameras

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """`contrast` (1 + K, B)."""
        logits = self.memory.similarity(feature) / self._temperature
        return {"contrast": info_nce(logits, row)}
