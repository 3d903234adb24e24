"""Losses against a memory of clusters or proxies, each by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from reid.modeling.memories import Fill, MemoryDtype, ProxyMemory, Update
from reid.modeling.memory_states import check_entries, check_numbers, check_vectors
from reid.structures import (
    OUTLIER,
    UNKNOWN_CAMERA,
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
        fill: See `ProxyMemory`.
        memory_dtype: See `ProxyMemory`.

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
        fill: Fill = "epoch",
        memory_dtype: MemoryDtype = "fp32",
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
        self.memory = ProxyMemory(momentum, update, fill, memory_dtype)
        for name in ("row", "row_to_camera"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)

    def memory_rows(self, labels: PseudoLabels) -> tuple[Tensor, Tensor]:
        """The row of each image in the memory (N,), -1 = none, and the camera of each row (P,)."""
        return labels.proxy, labels.proxy_to_camera

    def fill_rows(self) -> Tensor:
        """(N,) the row that each image's feature goes to when the memory is filled; -1 = none."""
        return self.row

    def sample_losses(self, feature: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Named losses (1 + K, B) of unit features (1 + K, B, D), with rows (B,) of 0 or more."""
        raise AssertionError(f"{type(self).__name__} must define sample_losses")

    def batch_losses(self, feature: Tensor, row: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`sample_losses`, for losses that look up something else of the batch's images."""
        return self.sample_losses(feature, row)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, and fills the memory unless it lasts.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        if features is None and not self.memory.lasts:
            raise ValueError(
                f"{type(self).__name__}: set_labels needs the features of the training images"
            )
        if not labels.num_proxies:
            raise ValueError(f"{type(self).__name__}: none of {len(labels)} images has a label")
        super().set_labels(labels, features)
        self.row, self.row_to_camera = self.memory_rows(labels)
        if features is not None and not self.memory.lasts:
            self.memory.reset(self.fill_rows(), len(self.row_to_camera), features)
        self.needs_features = not self.memory.lasts

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`global_NAME` and, if the model has parts, `part_NAME`, averaged over the batch."""
        with torch.autocast(embeddings.unit.device.type, enabled=False):
            feature, row = self._feature(embeddings), self.row[batch.index]
            values = self.batch_losses(feature, row.clamp(min=0), batch)
            weight = self.weights(row)
        losses = {name: (value * weight).sum(1) for name, value in values.items()}
        named = {f"global_{name}": value[0] for name, value in losses.items()}
        if len(feature) > 1:
            named |= {
                f"part_{name}": self._part_weight * value[1:].mean()
                for name, value in losses.items()
            }
        return named

    def weights(self, row: Tensor) -> Tensor:
        """The weight (B,) of each sample's loss, with rows (B,), -1 = none."""
        return sample_weights(row != OUTLIER, self.row_to_camera[row.clamp(min=0)], self._average)

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


class InstanceLoss(MemoryLoss):
    """The base of losses against a memory with a row for each image.

    Images of labelled training sets (source domains) share a row for each class; these rows come
    first. Their images without an identity have no row. Rows of images that could not be read are 0
    and have no label. With `fill: once`, the rows are what is clustered (`kept_features`), and
    checkpoints hold them.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        part_weight: Weight of the mean over the parts, if the model has any.
        fill: See `ProxyMemory`.
        source_domains: How many of the joined training sets, from the first on, are sources.

    Attributes:
        image_row: (N,) the row of each image, -1 = it has none.
        row_label: (M,) the label of each row, -1 = none.
        label_size: (C,) how many rows each label has.
        source_classes: S, number of rows of source classes.

    Raises:
        ValueError: A number is out of its range.
    """

    image_row: Tensor
    row_label: Tensor
    label_size: Tensor

    def __init__(
        self,
        temperature: Temperature,
        momentum: float,
        part_weight: float,
        fill: Fill = "once",
        source_domains: int = 0,
    ) -> None:
        super().__init__(temperature, momentum, part_weight, fill=fill)
        if source_domains < 0:
            raise ValueError(f"source_domains: expected 0 or more, got {source_domains}")
        self._source_domains = source_domains
        self.source_classes = 0
        for name in ("image_row", "row_label", "label_size"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)

    def memory_rows(self, labels: PseudoLabels) -> tuple[Tensor, Tensor]:
        """The row of each labelled image; rows have no camera."""
        row = torch.where(labels.cluster == OUTLIER, OUTLIER, self.image_row)
        return row, torch.full_like(self.row_label, UNKNOWN_CAMERA)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, and fills the memory unless it lasts.

        Raises:
            ValueError: Features are missing, no image has a label, or the number of images has
                changed since the memory was filled.
        """
        if features is not None and not self.memory.lasts:
            self._number_rows(labels, features)
        if len(self.image_row) not in (0, len(labels)):
            raise ValueError(
                f"{type(self).__name__}: the memory is of {len(self.image_row):,} images, but the "
                f"labels are of {len(labels):,}"
            )
        super().set_labels(labels, features)
        labelled = self.row != OUTLIER
        self.row_label = torch.full_like(self.row_label, OUTLIER)
        self.row_label[self.row[labelled]] = labels.cluster[labelled]
        size = torch.bincount(self.row_label + 1, minlength=1 + labels.num_clusters)
        self.label_size = size[1:]

    def _number_rows(self, labels: PseudoLabels, features: FeatureSet) -> None:
        source = features.domains < self._source_domains
        labelled = source & (labels.cluster != OUTLIER) & features.present
        classes = torch.unique(labels.cluster[labelled])
        self.source_classes = len(classes)
        if not torch.equal(classes, torch.arange(len(classes), device=classes.device)):
            raise ValueError(
                f"{type(self).__name__}: expected the labels of the source domains to come first, "
                f"0 to {len(classes) - 1}, but the largest is {int(classes.max())}"
            )
        target = self.source_classes + (~source).cumsum(0) - 1
        row = torch.where(source, labels.cluster, target)
        self.image_row = torch.where(features.present, row, OUTLIER)
        count = self.source_classes + int((~source).sum())
        self.row_label = row.new_full((count,), OUTLIER)

    def fill_rows(self) -> Tensor:
        """(N,) the row that each image's feature goes to when the memory is filled."""
        return self.image_row

    def label_means(self, similarity: Tensor, label: Tensor) -> Tensor:
        """Sums over the rows of each label, divided by the number of the label's rows: a mean.

        It takes B x (R + C) numbers for each bank; R x C are never stored.

        Args:
            similarity: (1 + K, R, B) of samples to rows; rows that are left out count as 0.
            label: (R,) the labels of these rows, -1 = none.

        Returns:
            (1 + K, B, C).
        """
        banks, _, count = similarity.shape
        size = len(self.label_size)
        # Rows without a label go to a last place, which is cut off.
        place = torch.where(label == OUTLIER, size, label)
        sums = similarity.new_zeros((banks, size + 1, count)).index_add(1, place, similarity)
        return (sums[:, :size] / self.label_size[:, None]).transpose(1, 2)

    def kept_features(self) -> FeatureSet | None:
        """The rows of the images, if the memory lasts."""
        if not self.memory.lasts:
            return None
        present = self.image_row != OUTLIER
        unit = self.memory.rows[:, self.image_row.clamp(min=0)]
        unit[:, ~present] = 0
        return FeatureSet.of(unit[0], unit=unit.transpose(0, 1), present=present)

    def memory_state(self) -> dict[str, Tensor]:
        """The rows, and which image has which, if the memory lasts."""
        if not self.memory.lasts:
            return {}
        classes = torch.tensor(self.source_classes)
        return {
            "rows": self.memory.rows, "image_row": self.image_row, "source_classes": classes,
        }  # fmt: skip

    def check_memory_state(self, state: Mapping[str, Any], count: int) -> None:
        """Checks a state for `load_memory_state`; see `Loss.check_memory_state`.

        Raises:
            ValueError: `memory_state` cannot have returned this state; names the entry.
        """
        if not self.memory.once:
            super().check_memory_state(state, count)
            return
        check_entries(state, ("rows", "image_row", "source_classes"))
        check_vectors(state["rows"], "rows", 3)
        rows = state["rows"].shape[1]
        check_numbers(state["image_row"], "image_row", count, rows)
        classes = state["source_classes"]
        if not isinstance(classes, Tensor) or classes.ndim or not 0 <= int(classes) <= rows:
            raise ValueError(f"source_classes: expected a number from 0 to {rows:,}")

    def load_memory_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `memory_state` returned."""
        if not state:
            return
        device = self.memory.rows.device
        self.memory.rows = state["rows"].to(device, copy=True)
        self.image_row = state["image_row"].to(device, copy=True)
        self.row_label = self.image_row.new_full((self.memory.rows.shape[1],), OUTLIER)
        self.source_classes = int(state["source_classes"])
        self.needs_features = False


class ProxyLoss(MemoryLoss):
    """The base of losses against the proxies of CAP: clusters that are split by camera.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        num_negatives: Number of hardest negatives; all other proxies if there are fewer.
        part_weight: Weight of the mean over the parts, if the model has any.
        average: See `sample_weights`.
        memory_dtype: See `ProxyMemory`.

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
        memory_dtype: MemoryDtype = "fp32",
    ) -> None:
        super().__init__(
            temperature, momentum, part_weight, average=average, memory_dtype=memory_dtype
        )
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
