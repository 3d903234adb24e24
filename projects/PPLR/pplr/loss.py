"""PPLR's two identity losses: parts refine the label of the image, and the image those of parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid import distributed
from reid.modeling.classifiers import ClusterClassifier, Moments
from reid.modeling.losses import Loss, smoothed_cross_entropy
from reid.neighbors import list_agreement, other_neighbors
from reid.registry import LOSS, Range
from reid.structures import OUTLIER, Batch, Embeddings, FeatureSet, PseudoLabels

Share = Annotated[float, Range(0, 1)]


@LOSS.register()
class PPLRLoss(Loss):
    """Identity losses with labels that global and part features refine for each other.

    Cho et al., *Part-based Pseudo Label Refinement for Unsupervised Person Re-identification*
    (CVPR 2022): part-guided label refinement and agreement-aware label smoothing. Each bank of
    features after the neck has a classifier, whose rows become the unit means of the clusters at
    the start of each epoch.

    - `global_refined`: the target of the whole image is `beta` * its cluster plus (1 - `beta`) *
      the predictions of the parts, weighted by the softmax of their agreements. It sends no
      gradient to the parts.
    - `part_smoothed`, mean over the parts: label smoothing at first; from `agreement_from_epoch` on
      cross entropy and the divergence of the prediction from an even one, weighted by agreement.

    The agreement of an image and a part is the share of common images among its nearest neighbours
    by the global feature and by the part's (`cross_agreement`).

    Args:
        embed_dim: D.
        num_parts: K.
        neighbors: k, the length of the neighbour lists; all other images if there are fewer.
        beta: Share of the cluster in the target of the whole image.
        smoothing: Label smoothing of the parts in the first epochs.
        agreement_from_epoch: The first epoch, from 0, in which agreement weights the parts' losses.
        moments: What happens to the optimizer's moments of the classifiers at the start of an
            epoch, `keep` or `drop`; see `ClusterClassifier`.

    Attributes:
        agreement: (N, K) agreement of each image and part, for the epoch.

    Raises:
        ValueError: The model has no parts, or a number is out of its range.
    """

    needs_features = True
    agreement: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_parts: int = 0,
        neighbors: Annotated[int, Range(1, 1000)] = 20,
        beta: Share = 0.5,
        smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1,
        agreement_from_epoch: Annotated[int, Range(0, 1_000_000)] = 5,
        moments: Moments = "keep",
    ) -> None:
        super().__init__()
        if not num_parts:
            raise ValueError(
                "PPLRLoss needs a head with parts, such as BNNeckStripeHead; the model's has none"
            )
        if neighbors < 1 or agreement_from_epoch < 0:
            raise ValueError(
                "expected neighbors of 1 or more and agreement_from_epoch of 0 or more, got "
                f"{neighbors}, {agreement_from_epoch}"
            )
        if not 0 <= beta <= 1 or not 0 <= smoothing < 1:
            raise ValueError(
                f"expected 0 <= beta <= 1 and 0 <= smoothing < 1, got {beta}, {smoothing}"
            )
        self._neighbors = neighbors
        self._beta = beta
        self._smoothing = smoothing
        self._agreement_from_epoch = agreement_from_epoch
        self.classifiers = nn.ModuleList(
            ClusterClassifier(embed_dim, moments) for _ in range(1 + num_parts)
        )
        self.register_buffer("agreement", torch.zeros(0, num_parts), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, refills the classifiers, and compares neighbours.

        Every process must call it: the exact searches are shared.

        Raises:
            ValueError: Features are missing, or no image has a label.
        """
        if features is None:
            raise ValueError("PPLRLoss: set_labels needs the features of the training images")
        if not labels.num_clusters:
            raise ValueError(f"PPLRLoss: none of {len(labels)} images has a label")
        super().set_labels(labels, features)
        for classifier, bank in zip(self.classifiers, features.unit.unbind(1), strict=True):
            assert isinstance(classifier, ClusterClassifier)
            classifier.refill(labels.cluster, labels.num_clusters, bank)
        with distributed.torch_threads_kept():
            agreement = distributed.run_on_main(lambda: cross_agreement(features, self._neighbors))
        self.agreement = agreement.to(self.agreement)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`global_refined` and `part_smoothed`, means over the labelled images."""
        with torch.autocast(embeddings.post.device.type, enabled=False):
            return self._losses(embeddings.post.unbind(1), batch.index)

    def _losses(self, banks: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        logits = [classify(bank) for classify, bank in zip(self.classifiers, banks, strict=True)]
        parts = torch.stack(logits[1:])
        target, agreement = self.cluster[index], self.agreement[index]
        if self.epoch < self._agreement_from_epoch:
            smoothed = [smoothed_cross_entropy(part, target, self._smoothing) for part in parts]
            part_loss = torch.stack(smoothed).mean()
        else:
            part_loss = agreement_smoothed(parts, target, agreement)
        return {
            "global_refined": part_guided(logits[0], parts, target, agreement, self._beta),
            "part_smoothed": part_loss,
        }


def cross_agreement(features: FeatureSet, k: int) -> Tensor:
    """How far each part agrees with the whole image about the nearest images.

    PPLR's cross agreement: |R_g & R_p| / |R_g or R_p|, with R the k nearest other images among all
    that could be read, un-clustered ones included. The search is exact and holds blocks of scores
    only: with 32,621 images of 2048 numbers it takes about 150 MB beside the features, and a copy
    of one bank (270 MB) if these are on a GPU or if an image could not be read.

    Args:
        features: Of N images, with banks of the whole image and of K parts.
        k: Length of the neighbour lists; all other images if there are fewer.

    Returns:
        (N, K) on the CPU, 0 to 1; 0 for images that could not be read.
    """
    rows = features.present.nonzero()[:, 0]
    banks = features.unit.unbind(1)
    if len(rows) < len(features):
        whole, *parts = (other_neighbors(bank[rows], k) for bank in banks)
    else:
        whole, *parts = (other_neighbors(bank, k) for bank in banks)
    agreement = torch.zeros(len(features), len(parts))
    columns = [list_agreement(whole, part) for part in parts]
    agreement[rows.cpu()] = torch.from_numpy(np.stack(columns, 1))
    return agreement


def part_guided(
    logits: Tensor, part_logits: Tensor, target: Tensor, agreement: Tensor, beta: float
) -> Tensor:
    """Cross entropy with PPLR's part-guided label refinement.

    The target is beta onehot(y) + (1 - beta) sum_p w_p softmax(part logits), w the softmax of the
    agreements over the parts. No gradient flows through the target.

    Args:
        logits: (B, C) of the whole images.
        part_logits: (K, B, C).
        target: (B,) int64 clusters; -1 = left out.
        agreement: (B, K).
        beta: Share of the cluster in the target.

    Returns:
        The mean over the images with a target; 0 if there are none.
    """
    with torch.no_grad():
        weight = agreement.to(part_logits.dtype).softmax(1)
        ensemble = torch.einsum("bk,kbc->bc", weight, part_logits.softmax(2))
    log_prob = F.log_softmax(logits, 1)
    hard = -log_prob.gather(1, target.clamp(min=0)[:, None])[:, 0]
    soft = -(ensemble * log_prob).sum(1)
    return _labelled_mean(beta * hard + (1 - beta) * soft, target)


def agreement_smoothed(part_logits: Tensor, target: Tensor, agreement: Tensor) -> Tensor:
    """The parts' loss with PPLR's agreement-aware label smoothing.

    a CE + (1 - a) KL, a the agreement and KL = sum_c u (log u - log p_c) with u = 1 / C: the
    divergence of the prediction from an even one.

    Args:
        part_logits: (K, B, C).
        target: (B,) int64 clusters; -1 = left out.
        agreement: (B, K).

    Returns:
        The mean over the parts and the images with a target; 0 if there are none.
    """
    log_prob = F.log_softmax(part_logits, 2)
    place = target.clamp(min=0).expand(len(part_logits), -1)[..., None]
    cross_entropy = -log_prob.gather(2, place)[..., 0]
    divergence = -math.log(part_logits.shape[2]) - log_prob.mean(2)
    share = agreement.to(log_prob.dtype).T
    loss = share * cross_entropy + (1 - share) * divergence
    return _labelled_mean(loss.mean(0), target)


def _labelled_mean(loss: Tensor, target: Tensor) -> Tensor:
    """The mean (B,) -> () over the images with a target; 0 if there are none."""
    labelled = target != OUTLIER
    return torch.where(labelled, loss, 0.0).sum() / labelled.sum().clamp(min=1)
