"""RLCC's loss: contrast with hard labels, and with labels that the last epoch's clusters refine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from reid.modeling.contrastive import floored_log_softmax
from reid.modeling.losses import Temperature
from reid.modeling.memory_losses import MemoryLoss
from reid.modeling.memory_states import check_entries, check_numbers, check_vectors
from reid.projects.rlcc.consensus import clustering_consensus
from reid.registry import LOSS, Range
from reid.structures import UNKNOWN_CAMERA, Batch, FeatureSet, PseudoLabels


@LOSS.register()
class RLCCLoss(MemoryLoss):
    """Contrast over a memory of clusters with hard and with refined labels: `hard`, `soft`.

    Zhang et al., *Refining Pseudo Labels with Clustering Consensus over Generations* (CVPR 2021).
    With l_k = log(p_k + 1e-6) and p_k = exp z_k / (sum exp z + 1e-6), z the similarities divided by
    tau: `hard` is -alpha l_y and `soft` is -(1 - alpha) sum_k q_k l_k. In the first epoch `hard` is
    -l_y and `soft` is 0.

    The refined label of an image is q = P M. M is the consensus of the last epoch's clusters with
    the present ones (`clustering_consensus`). P is softmax(`scale` c . f) over the last epoch's
    centres c, as extracted then, and the image's feature f, as extracted now; from the third epoch
    on it is alpha onehot(last cluster) + (1 - alpha) of this.

    Refined labels are computed for each batch, from N x D features, the old centres and at most N
    entries of M: B x (C_old + C + N) numbers for each bank. N x C are never stored.

    Checkpoints hold the clusters and the centres of the epoch, which the next epoch needs.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        alpha: Weight of the hard labels in the loss, and of the last cluster in P.
        scale: Factor of the similarities in P, 1 over its temperature.
        part_weight: Weight of the mean over the parts, if the model has any.

    Raises:
        ValueError: A number is out of its range.
    """

    normalizes = True  # as in the published module
    centers: Tensor
    old_cluster: Tensor
    old_centers: Tensor
    old_of: Tensor
    new_of: Tensor
    consensus: Tensor
    feature: Tensor

    def __init__(
        self,
        temperature: Temperature = 0.04,
        momentum: float = 0.2,
        alpha: Annotated[float, Range(0, 1)] = 0.9,
        scale: Annotated[float, Range(0, 1e4)] = 30.0,
        part_weight: float = 0.1,
    ) -> None:
        super().__init__(temperature, momentum, part_weight)
        if not 0 <= alpha <= 1 or scale < 0:
            raise ValueError(
                f"expected alpha from 0 to 1 and scale of 0 or more, got {alpha}, {scale}"
            )
        self._alpha = alpha
        self._scale = scale
        self._generation = -1
        for name in ("old_cluster", "old_of", "new_of"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        for name in ("centers", "old_centers", "consensus", "feature"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def memory_rows(self, labels: PseudoLabels) -> tuple[Tensor, Tensor]:
        """The clusters."""
        cameras = torch.full((labels.num_clusters,), UNKNOWN_CAMERA, device=labels.cluster.device)
        return labels.cluster, cameras

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, fills the memory, and compares with the last labels.

        Raises:
            ValueError: Features are missing, no image has a label, or the number of images has
                changed.
        """
        before = self.cluster, self.centers
        if self._generation >= 0 and len(self.cluster) != len(labels):
            raise ValueError(
                f"{type(self).__name__}: the last labels were of {len(self.cluster):,} images, "
                f"these are of {len(labels):,}"
            )
        super().set_labels(labels, features)
        assert features is not None
        self._generation += 1
        self.centers = self.memory.rows.clone()
        if not self._generation:
            return
        self.old_cluster, self.old_centers = before
        self.feature = features.unit.transpose(0, 1)
        consensus = clustering_consensus(self.old_cluster, self.cluster)
        self.old_of, self.new_of = consensus.old, consensus.new
        self.consensus = consensus.weight.to(self.feature.dtype)

    @torch.no_grad()
    def soft_labels(self, index: Tensor) -> Tensor:
        """Refined labels q (1 + K, B, C) of images (B,), from the second epoch on."""
        similarity = self.old_centers @ self.feature[:, index].transpose(1, 2)
        old = (self._scale * similarity).softmax(1)  # (1 + K, C_old, B)
        if self._generation > 1:
            number = torch.arange(old.shape[1], device=old.device)
            last = self.old_cluster[index] == number[:, None]  # all False if it had no cluster
            share = self._alpha * last.any(0)
            old = share * last + (1 - share) * old
        soft = old.new_zeros((len(old), self.memory.rows.shape[1], len(index)))
        entries = old[:, self.old_of] * self.consensus[:, None]
        return soft.index_add_(1, self.new_of, entries).transpose(1, 2)

    def batch_losses(self, feature: Tensor, row: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`hard` and `soft` (1 + K, B)."""
        logits = self.memory.similarity(feature) / self._temperature
        log_share = floored_log_softmax(logits)
        own = -log_share.gather(2, row.expand(len(logits), -1)[..., None])[..., 0]
        if self._generation < 1:
            return {"hard": own, "soft": own.new_zeros(own.shape)}
        soft = -(self.soft_labels(batch.index) * log_share).sum(2)
        return {"hard": self._alpha * own, "soft": (1 - self._alpha) * soft}

    def memory_state(self) -> dict[str, Tensor]:
        """Clusters and centres of the epoch, and the number of epochs with labels before it."""
        if self._generation < 0:
            return {}
        generation = torch.tensor(self._generation)
        return {"cluster": self.cluster, "centers": self.centers, "generation": generation}

    def check_memory_state(self, state: Mapping[str, Any], count: int) -> None:
        """Checks a state for `load_memory_state`; see `Loss.check_memory_state`.

        Raises:
            ValueError: `memory_state` cannot have returned this state; names the entry.
        """
        check_entries(state, ("cluster", "centers", "generation"))
        check_vectors(state["centers"], "centers", 3)
        check_numbers(state["cluster"], "cluster", count, state["centers"].shape[1])
        generation = state["generation"]
        if not isinstance(generation, Tensor) or generation.ndim or int(generation) < 0:
            raise ValueError("generation: expected a number of 0 or more")

    def load_memory_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `memory_state` returned."""
        if state:
            device = self.cluster.device
            self.cluster = state["cluster"].to(device, copy=True)
            self.centers = state["centers"].to(device, copy=True)
            self._generation = int(state["generation"])
