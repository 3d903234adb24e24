"""MMT's losses: students learn from clusters, and from each other's teachers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.classifiers import ClusterClassifier
from reid.modeling.losses import Loss, Source, smoothed_cross_entropy
from reid.modeling.triplets import euclidean_distances, hardest_pairs
from reid.registry import LOSS, Range
from reid.structures import OUTLIER, FeatureSet, PseudoLabels

Share = Annotated[float, Range(0, 1)]


def network_name(role: str, number: int) -> str:
    """The name of a network, counted from 0: `student`, `student2`, ..."""
    return role if number == 0 else f"{role}{number + 1}"


@LOSS.register()
class MMTLoss(Loss):
    """Hard and soft identity and triplet losses of mutual mean teaching.

    Ge, Chen and Li, *Mutual Mean-Teaching* (ICLR 2020). Student a sees view a of each image, and so
    does its teacher. With w and v the weights of the soft losses, the total is the sum over the
    students of

    - `cross_entropy`, (1 - w) times: with the clusters, smoothed (eq. 1);
    - `soft_cross_entropy`, w times: with the prediction of the next student's teacher (eq. 7);
    - `triplet`, (1 - v) times: log(1 + exp(dp - dn)), of the distances to the farthest image of the
      same cluster, the image itself included, and to the nearest of another (eq. 5);
    - `soft_triplet`, v times: the cross entropy of softmax(dp, dn) with that of the teacher's
      distances between the same images (eq. 8 and 9).

    No gradient flows through a teacher. With a single student, its own teacher sees view 1: the
    mean teacher. With both weights 0 no teacher is asked for: the baseline on hard labels.

    Each network has a classifier, without bias, on the features after the neck. Its rows become
    the clusters' unit mean features at the start of each epoch. Those of a teacher then follow the
    student's as the hook `MeanTeacher` says.

    The run needs `model.students` for the second student, and a hook `MeanTeacher` for each
    student: `teacher` and `teacher2`.

    Args:
        embed_dim: D.
        students: How many students there are.
        smoothing: Share of the target that is spread over all clusters.
        soft_ce_weight: w.
        soft_triplet_weight: v.

    Raises:
        ValueError: A number is out of its range.
    """

    needs_features = True

    def __init__(
        self,
        embed_dim: int,
        students: Annotated[int, Range(1, 8)] = 2,
        smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1,
        soft_ce_weight: Share = 0.5,
        soft_triplet_weight: Share = 0.8,
    ) -> None:
        super().__init__()
        if students < 1:
            raise ValueError(f"students: expected 1 or more, got {students}")
        if not (0 <= smoothing < 1 and 0 <= soft_ce_weight <= 1 and 0 <= soft_triplet_weight <= 1):
            raise ValueError(
                "expected 0 <= smoothing < 1 and weights from 0 to 1, got "
                f"{smoothing}, {soft_ce_weight}, {soft_triplet_weight}"
            )
        self._smoothing = smoothing
        self._soft_ce_weight = soft_ce_weight
        self._soft_triplet_weight = soft_triplet_weight
        teachers = students if soft_ce_weight or soft_triplet_weight else 0
        self.classifiers = nn.ModuleList(
            ClusterClassifier(embed_dim, "drop") for _ in range(students)
        )
        self.teacher_classifiers = nn.ModuleList(
            ClusterClassifier(embed_dim, "drop").requires_grad_(False) for _ in range(teachers)
        )
        self.asks_for: Sequence[Source] = (
            *((network_name("student", a), a) for a in range(students)),
            *((network_name("teacher", a), a if students > 1 else 1) for a in range(teachers)),
        )

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, and refills the classifiers of all networks.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        if features is None:
            raise ValueError("MMTLoss: set_labels needs the features of the training images")
        if not labels.num_clusters:
            raise ValueError(f"MMTLoss: none of {len(labels)} images has a label")
        super().set_labels(labels, features)
        for classifier in (*self.classifiers, *self.teacher_classifiers):
            assert isinstance(classifier, ClusterClassifier)
            classifier.refill(labels.cluster, labels.num_clusters, features.unit[:, 0])

    def followers(self, teacher: str) -> list[tuple[Tensor, Tensor]]:
        """The rows of the teacher's classifier, with those of its student's."""
        names = [network_name("teacher", a) for a in range(len(self.teacher_classifiers))]
        if teacher not in names:
            return []
        a = names.index(teacher)
        mine, followed = self.teacher_classifiers[a].weight, self.classifiers[a].weight
        assert isinstance(mine, Tensor)
        assert isinstance(followed, Tensor)
        return [(mine, followed)]

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """The weighted losses, each summed over the students; means over the labelled images."""
        *embeddings, batch = inputs
        target = self.cluster[batch.index]
        count = len(self.classifiers)
        with torch.autocast(target.device.type, enabled=False):
            raw = [given.pre[:, 0].float() for given in embeddings]
            logits = [
                classify(given.post[:, 0])
                for classify, given in zip(
                    (*self.classifiers, *self.teacher_classifiers), embeddings, strict=True
                )
            ]
            sums: dict[str, Tensor] = {}
            for a in range(count):
                partner = count + (a + 1) % count  # where the next student's teacher is
                soft = (raw[partner], logits[partner]) if len(raw) > count else None
                for name, value in self._losses(raw[a], logits[a], target, soft).items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def _losses(
        self, raw: Tensor, logits: Tensor, target: Tensor, soft: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """The losses of a student; `soft`: raw features and logits of a teacher."""
        w, v = self._soft_ce_weight, self._soft_triplet_weight
        distance = euclidean_distances(raw)
        positive, negative, valid = hardest_pairs(distance, target)
        pairs = _pairs(distance, positive, negative)
        hard = _mean(F.softplus(pairs[:, 0] - pairs[:, 1]), valid)
        identity = smoothed_cross_entropy(logits, target, self._smoothing)
        losses = {"cross_entropy": (1 - w) * identity, "triplet": (1 - v) * hard}
        if soft is None:
            return losses
        teacher_raw, teacher_logits = (given.detach() for given in soft)
        teacher_pairs = _pairs(euclidean_distances(teacher_raw), positive, negative)
        identity = _mean(soft_cross_entropy(logits, teacher_logits), target != OUTLIER)
        triplet = _mean(soft_cross_entropy(pairs, teacher_pairs), valid)
        return losses | {"soft_cross_entropy": w * identity, "soft_triplet": v * triplet}


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy (B,) of predictions with a teacher's; logits (B, C) each.

    Of the distances (dp, dn) it is MMT's soft triplet loss: with pi = softmax(dp', dn')_1 it is
    pi log(1 + exp(dn - dp)) + (1 - pi) log(1 + exp(dp - dn)).
    """
    return -(teacher_logits.softmax(1) * F.log_softmax(logits, 1)).sum(1)


def _pairs(distance: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(B, 2): each image's distances to its positive and its negative."""
    return distance.gather(1, torch.stack((positive, negative), 1))


def _mean(loss: Tensor, counts: Tensor) -> Tensor:
    """The mean (B,) -> () over the images that count; 0 if there are none."""
    return torch.where(counts, loss, 0.0).sum() / counts.sum().clamp(min=1)
