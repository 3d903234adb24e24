"""Losses against a memory of clusters or proxies, each by name."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.contrastive import (
    Average,
    Choice,
    ProxyGroups,
    choose_offline,
    even_nce,
    sample_weights,
)
from reid.modeling.losses import Loss, Temperature
from reid.modeling.memories import ProxyMemory, Update
from reid.structures import (
    OUTLIER,
    Batch,
    Embeddings,
    FeatureSet,
    PseudoLabels,
)


class MemoryLoss(Loss):
    """The base of losses that compare a batch with a memory, by whole image and by part.

    A subclass defines named losses of each sample in each bank (`sample_losses`). This class makes
    `global_NAME` of them and, if the model has parts, `part_NAME`: `part_weight` * the mean over
    the parts. Samples without a row are left out. `commit` moves the memory.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        update: See `ProxyMemory`.
        average: See `sample_weights`.
        part_weight: Weight of the parts (TMGF's lambda_p).

    Attributes:
        memory: The memory; its rows are clusters or proxies, as `memory_rows` says.
        normalizes: Whether features are normalised once more, which changes nothing for a model's
            unit features.

    Raises:
        ValueError: A number is out of its range.
    """

    needs_features = True
    normalizes = False
    row: Tensor
    row_to_camera: Tensor

    def __init__(
        self,
        temperature: Temperature,
        momentum: float,
        part_weight: float,
        update: Update = "sequential",
        average: Average = "batch",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        if part_weight < 0:
            raise ValueError(f"part_weight: expected 0 or more, got {part_weight}")
        if average not in ("batch", "camera"):
            raise ValueError(f"average: expected batch or camera, got {average!r}")
        self._temperature = temperature
        self._part_weight = part_weight
        self._average: Average = average
        self.memory = ProxyMemory(momentum, update)
        for name in ("row", "row_to_camera"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)

    def memory_rows(self, labels: PseudoLabels) -> tuple[Tensor, Tensor]:
        """The row of each image in the memory (N,), -1 = none, and the camera of each row (P,)."""
        return labels.proxy, labels.proxy_to_camera

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Named losses (1 + K, B) of unit features (1 + K, B, D), with rows (B,) of 0 or more."""
        raise AssertionError(f"{type(self).__name__} must define sample_losses")

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch and fills the memory.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        if features is None:
            raise ValueError(
                f"{type(self).__name__}: set_labels needs the features of the training images"
            )
        if not labels.num_proxies:
            raise ValueError(f"{type(self).__name__}: none of {len(labels)} images has a label")
        super().set_labels(labels, features)
        self.row, self.row_to_camera = self.memory_rows(labels)
        self.memory.reset(self.row, len(self.row_to_camera), features)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`global_NAME` and, if the model has parts, `part_NAME`, averaged over the batch."""
        with torch.autocast(embeddings.unit.device.type, enabled=False):
            feature, row = self._feature(embeddings), self.row[batch.index]
            values = self.sample_losses(feature, row.clamp(min=0))
            camera = self.row_to_camera[row.clamp(min=0)]
            weight = sample_weights(row != OUTLIER, camera, self._average)
        losses = {name: (value * weight).sum(1) for name, value in values.items()}
        named = {f"global_{name}": value[0] for name, value in losses.items()}
        if len(feature) > 1:
            named |= {
                f"part_{name}": self._part_weight * value[1:].mean()
                for name, value in losses.items()
            }
        return named

    @torch.no_grad()
    def commit(  # type: ignore[override]  # see `Loss.asks_for`
        self, embeddings: Embeddings, batch: Batch, *, taken: Tensor | None = None
    ) -> None:
        """Moves the memory by the batch."""
        with torch.autocast(embeddings.unit.device.type, enabled=False):
            self.memory.update(self.row[batch.index], self._feature(embeddings), taken)

    def _feature(self, embeddings: Embeddings) -> Tensor:
        """Unit features (1 + K, B, D), in float32 or float64."""
        unit = embeddings.unit
        feature = unit.to(torch.promote_types(unit.dtype, torch.float32)).transpose(0, 1)
        return F.normalize(feature, dim=2) if self.normalizes else feature


class ProxyLoss(MemoryLoss):
    """The base of losses against the proxies of CAP: clusters that are split by camera.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        num_negatives: Number of hardest negatives; all other proxies if there are fewer.
        part_weight: Weight of the mean over the parts, if the model has any.
        average: See `sample_weights`.

    Raises:
        ValueError: A number is out of its range.
    """

    proxy_to_cluster: Tensor

    def __init__(
        self,
        temperature: Temperature,
        momentum: float,
        num_negatives: int,
        part_weight: float,
        average: Average,
    ) -> None:
        super().__init__(temperature, momentum, part_weight, average=average)
        if num_negatives < 1:
            raise ValueError(f"num_negatives: expected 1 or more, got {num_negatives}")
        self._num_negatives = num_negatives
        self._clusters = ProxyGroups(torch.zeros(0, dtype=torch.int64))
        self.register_buffer(
            "proxy_to_cluster", torch.zeros(0, dtype=torch.int64), persistent=False
        )

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch and fills the memory.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        super().set_labels(labels, features)
        self.proxy_to_cluster = labels.proxy_to_cluster
        self._clusters = ProxyGroups(labels.proxy_to_cluster)

    def offline_losses(self, feature: Tensor, similarity: Tensor, row: Tensor) -> Tensor:
        """The losses (1 + K, B) against all proxies of a sample's cluster and the hardest others.

        Args:
            feature: (1 + K, B, D).
            similarity: (1 + K, B, P) similarities of the features to the memory's rows.
            row: (B,) proxies of the samples.
        """
        choice = choose_offline(
            similarity, self.proxy_to_cluster[row], self._clusters, self._num_negatives
        )
        return self._choice_loss(feature, choice)

    def _choice_loss(self, feature: Tensor, choice: Choice) -> Tensor:
        logits = self.memory.similarity_to(feature, choice.proxies) / self._temperature
        return even_nce(logits, choice)
