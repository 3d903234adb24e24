"""ICE's losses of a student with a teacher: fixed cluster centres, and pairs of a batch."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.losses import STUDENT, Loss, Temperature, smoothed_cross_entropy
from reid.registry import LOSS, Range
from reid.structures import OUTLIER, Embeddings, FeatureSet, PseudoLabels


@LOSS.register()
class ICELoss(Loss):
    """The terms of ICE that know no cameras: `cluster`, `hard` and `soft`.

    Chen et al., *ICE* (ICCV 2021), as in the published code. f_S is the student's feature of view 0
    after the neck, not normalised; f_T is the teacher's. View 0 and 1 are strong augmentations,
    view 2 is weak. Gradients reach f_S alone.

    - cluster: cross entropy of f_S . c / `temperature` with label smoothing. The centre c of a
      cluster is the plain mean of its unit features, and stays for the epoch.
    - hard: s_ij is the cosine of f_S of image i and f_T of view 1 of image j. InfoNCE of the
      smallest s_ij of i's cluster against all s_ij of other clusters.
    - soft: KL(P_i || Q_i). P_i is the softmax over the batch of the cosines of f_T of the weak
      views, Q_i that of s_ij.

    The teacher also sees view 0, for its running statistics alone.

    Args:
        temperature: Of `cluster`.
        smoothing: Label smoothing of `cluster`, spread over all clusters.
        hard_temperature: Of `hard`.
        soft_temperature: Of `soft`, for P and Q.
        soft_weight: Weight of `soft`.
        student_sees_view_1: Run the student on view 1 too, as the published code does. Only its
            running statistics move, which nothing reads; the loss is the same.

    Attributes:
        centres: (C, D), not normalised.

    Raises:
        ValueError: A number is out of its range.
    """

    needs_features = True
    centres: Tensor

    def __init__(
        self,
        temperature: Temperature = 0.5,
        smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1,
        hard_temperature: Temperature = 0.1,
        soft_temperature: Temperature = 0.4,
        soft_weight: Annotated[float, Range(0, 1e6)] = 10.0,
        student_sees_view_1: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("hard_temperature", hard_temperature),
                            ("soft_temperature", soft_temperature)):  # fmt: skip
            if value is None or not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not 0 <= smoothing < 1 or soft_weight < 0:
            raise ValueError(
                "expected 0 <= smoothing < 1 and soft_weight of 0 or more, got "
                f"{smoothing}, {soft_weight}"
            )
        self._temperature = temperature
        self._smoothing = smoothing
        self._hard_temperature = hard_temperature
        self._soft_temperature = soft_temperature
        self._soft_weight = soft_weight
        second = (("student", 1),) * student_sees_view_1
        self.asks_for = (STUDENT, *second, ("teacher", 0), ("teacher", 1), ("teacher", 2))
        self.register_buffer("centres", torch.zeros(0, 0), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, and the means of their unit features.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        if features is None:
            raise ValueError("ICELoss: set_labels needs the features of the training images")
        if not labels.num_proxies:
            raise ValueError(f"ICELoss: none of {len(labels)} images has a label")
        super().set_labels(labels, features)
        clustered = labels.cluster != OUTLIER
        cluster, unit = labels.cluster[clustered], features.unit[clustered, 0]
        sums = unit.new_zeros(labels.num_clusters, unit.shape[1]).index_add_(0, cluster, unit)
        self.centres = sums / torch.bincount(cluster)[:, None]

    def forward(self, student: Embeddings, *others: Any) -> dict[str, Tensor]:
        """`cluster`, `hard` and `soft`, each the mean over the labelled images of the batch."""
        *_, teacher, weak, batch = others
        return self._losses(
            _feature(student), _feature(teacher), _feature(weak), self.cluster[batch.index]
        )

    def _losses(
        self, student: Tensor, teacher: Tensor, weak: Tensor, label: Tensor
    ) -> dict[str, Tensor]:
        """The losses of features (B, D) after the neck, with clusters (B,)."""
        with torch.autocast(student.device.type, enabled=False):
            logits = student @ self.centres.to(student.dtype).T / self._temperature
            teacher, weak = F.normalize(teacher, dim=1), F.normalize(weak, dim=1)
            similarity = F.normalize(student, dim=1) @ teacher.T
            target = weak @ weak.T / self._soft_temperature
            return {
                "cluster": smoothed_cross_entropy(logits, label, self._smoothing),
                "hard": hard_instance_nce(similarity, label, self._hard_temperature),
                "soft": self._soft_weight
                * soft_consistency(similarity / self._soft_temperature, target, label),
            }


def hard_instance_nce(similarity: Tensor, label: Tensor, temperature: float) -> Tensor:
    """InfoNCE of each image's least similar positive against all negatives of the batch.

    Args:
        similarity: (B, B) of the student's images to the teacher's.
        label: (B,), -1 = left out.
        temperature: tau.

    Returns:
        The mean over the labelled images; 0 where there is no negative.
    """
    labelled = label != OUTLIER
    same = label[:, None] == label
    hardest = similarity.detach().masked_fill(~same, torch.inf).argmin(1, keepdim=True)
    positive = similarity.gather(1, hardest)
    negatives = similarity.masked_fill(same | ~labelled, -torch.inf)
    logits = torch.cat((positive, negatives), 1) / temperature
    losses = logits.logsumexp(1) - logits[:, 0]
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)


def soft_consistency(logits: Tensor, target_logits: Tensor, label: Tensor) -> Tensor:
    """KL(P || Q) of softmax distributions over the batch.

    Args:
        logits: (B, B) of Q.
        target_logits: (B, B) of P.
        label: (B,), -1 = left out as a row, and as a column.

    Returns:
        The mean over the labelled images.
    """
    labelled = label != OUTLIER
    q, p = (each.masked_fill(~labelled, -1e4).log_softmax(1) for each in (logits, target_logits))
    losses = (p.exp() * (p - q)).sum(1)
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)


def _feature(embeddings: Embeddings) -> Tensor:
    """The feature of the whole image after the neck (B, D), in float32 or float64."""
    feature = embeddings.post[:, 0]
    return feature.to(torch.promote_types(feature.dtype, torch.float32))
