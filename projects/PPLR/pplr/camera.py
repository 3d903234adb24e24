"""PPLR's camera term: a sample's cluster as the other cameras see it."""

from __future__ import annotations

import torch
from torch import Tensor

from reid.modeling.contrastive import Choice, choose_offline
from reid.modeling.losses import Temperature
from reid.modeling.memory_losses import ProxyLoss
from reid.registry import LOSS
from reid.structures import Batch, Embeddings


@LOSS.register()
class PPLRCameraLoss(ProxyLoss):
    """Contrast with camera proxies that stay fixed during the epoch: `camera`.

    The camera-aware variant of Cho et al., *Part-based Pseudo Label Refinement for Unsupervised
    Person Re-identification* (CVPR 2022). Positives are the proxies of the sample's cluster in the
    other cameras. Negatives are the most similar proxies of other clusters, in any camera, chosen
    in each space on its own. The proxy of the sample's own camera is neither. A sample whose
    cluster no other camera sees has a loss of 0, and counts in the mean. The total is the loss of
    the whole image plus `part_weight` * the mean over the parts.

    The labels must be split by camera, as by `CameraProxyClusterer`; otherwise no sample has a
    positive, and the loss is 0.

    Args:
        temperature: tau.
        num_negatives: Number of negatives; all proxies of other clusters if there are fewer.
        part_weight: Weight of the mean over the parts.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self, temperature: Temperature = 0.07, num_negatives: int = 50, part_weight: float = 1.0
    ) -> None:
        super().__init__(temperature, 1.0, num_negatives, part_weight, "batch")

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """`camera` (1 + K, B)."""
        similarity = self.memory.similarity(feature).detach()
        cluster = self.proxy_to_cluster[row]
        choice = choose_offline(similarity, cluster, self._clusters, self._num_negatives)
        choice, has_positive = without_own(choice, row)
        loss = self._choice_loss(feature, choice)
        return {"camera": torch.where(has_positive, loss, torch.zeros_like(loss))}

    def commit(  # type: ignore[override]  # see `Loss.asks_for`
        self, embeddings: Embeddings, batch: Batch, *, taken: Tensor | None = None
    ) -> None:
        """Changes nothing: the proxies are those of the start of the epoch."""


def without_own(choice: Choice, row: Tensor) -> tuple[Choice, Tensor]:
    """A choice without the samples' own proxies.

    A sample without another positive keeps its own proxy, so that its loss is a number; the caller
    leaves it out.

    Args:
        choice: Positives and negatives (M, B, n).
        row: (B,) the samples' own proxies.

    Returns:
        The choice; and which samples have another positive, (M, B) bool.
    """
    own = choice.proxies == row[:, None]
    has_positive = (choice.positive & ~own).any(2)
    left_out = own & has_positive[..., None]
    return (
        Choice(choice.proxies, choice.positive & ~left_out, choice.valid & ~left_out),
        has_positive,
    )
