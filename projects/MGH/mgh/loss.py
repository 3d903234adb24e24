"""MGH's losses: proxies of the camera, clusters across cameras, ranks of all images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reid.modeling.contrastive import choose_offline, even_nce, sample_weights
from reid.modeling.losses import Temperature
from reid.modeling.memories import ProxyMemory
from reid.modeling.memory_losses import ProxyLoss
from reid.projects.mgh.distance import places_in_camera
from reid.projects.mgh.labeller import CAMERA_WEIGHT, NEAREST, RELEVANT
from reid.registry import LOSS
from reid.structures import OUTLIER, Batch, Embeddings, FeatureSet, PseudoLabels

_LARGEST_EXPONENT = 50.0


@LOSS.register()
class MGHLoss(ProxyLoss):
    """MGH's losses: `camera`, and from `from_epoch` on (0 before) `identity` and `instance`.

    Wu et al., *Metadata Guided Hypergraph for Unsupervised Person Re-identification* (ACM MM 2021),
    as published; means of the cameras in a batch are summed:

    - camera: cross entropy among the proxies of the sample's own camera. `soft`: the target is the
      softmax of 1 - the mean distance to each of them, divided by `temperature`; `hard`: one-hot,
      which is CAP's intra-camera loss;
    - identity: CAP's inter-camera loss, times `identity_weight`, against a copy of the memory from
      the start of the epoch;
    - instance: 1 - smooth average precision of the sample among its nearest images, by the features
      of the start of the epoch, times `instance_weight`, and divided by the batch size once more
      than a mean needs, so 10 acts as 0.31 in a batch of 32. A sample without a relevant image
      counts as 0 (it makes the published loss undefined).

    The targets come with the labels of `HypergraphLabels`.

    Args:
        temperature: tau.
        momentum: Share of a memory row that an update keeps (mu).
        identity_weight: Weight of `identity`.
        instance_weight: Weight of `instance`; 0 switches it off.
        from_epoch: The first epoch with `identity` and `instance`, from 0; that of the labeller.
        num_negatives: Number of negatives of `identity`; all other proxies if there are fewer.
        camera_target: `soft` or `hard`.
        anneal: Width of the smooth step that compares two similarities.
        part_weight: Weight of the mean over the parts, if the model has any.

    Raises:
        ValueError: A number is out of its range.
    """

    normalizes = True
    place: Tensor
    instances: Tensor

    def __init__(
        self,
        temperature: Temperature = 0.07,
        momentum: float = 0.2,
        identity_weight: float = 1.0,
        instance_weight: float = 10.0,
        from_epoch: int = 5,
        num_negatives: int = 50,
        camera_target: Literal["soft", "hard"] = "soft",
        anneal: Temperature = 0.01,
        part_weight: float = 0.1,
    ) -> None:
        super().__init__(temperature, momentum, num_negatives, part_weight, "camera")
        if identity_weight < 0 or instance_weight < 0 or from_epoch < 0 or anneal <= 0:
            raise ValueError(
                "expected identity_weight, instance_weight and from_epoch of 0 or more and anneal "
                f"above 0, got {identity_weight}, {instance_weight}, {from_epoch}, {anneal}"
            )
        if camera_target not in ("soft", "hard"):
            raise ValueError(f"camera_target: expected soft or hard, got {camera_target!r}")
        self._weights = {"identity": identity_weight, "instance": instance_weight}
        self._from_epoch = from_epoch
        self._soft = camera_target == "soft"
        self._anneal = anneal
        self._side: Mapping[str, Tensor] = {}
        self._start = ProxyMemory(momentum)
        self.register_buffer("place", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("instances", torch.zeros(0, 0, 0), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch, and fills the memories.

        Raises:
            ValueError: Features are missing, no image has a label, or the labels have no targets.
        """
        super().set_labels(labels, features)
        assert features is not None  # checked by the base
        needed = {CAMERA_WEIGHT} if self._soft else set()
        if self._begun and self._weights["instance"]:
            needed |= {NEAREST, RELEVANT}
        if missing := needed.difference(labels.side):
            raise ValueError(
                f"MGHLoss needs labels with {', '.join(sorted(missing))}, which the labeller "
                "HypergraphLabels gives (with the same from_epoch, and not for the labels of a run "
                "that was resumed with on_collapse: keep); or set camera_target: hard and "
                "instance_weight: 0"
            )
        self._side = labels.side
        self._start.rows = self.memory.rows.clone()
        self.instances = features.unit if NEAREST in needed else features.unit[:0]
        place = places_in_camera(labels.proxy_to_camera.cpu().numpy())
        self.place = torch.from_numpy(place).to(self.row.device)

    @property
    def _begun(self) -> bool:
        return self.epoch >= self._from_epoch

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`global_NAME` and, if the model has parts, `part_NAME`."""
        with torch.autocast(embeddings.unit.device.type, enabled=False):
            feature, row = self._feature(embeddings), self.row[batch.index]
            known = row.clamp(min=0)
            by_camera = sample_weights(row != OUTLIER, self.row_to_camera[known], "camera")
            losses = {"camera": self._camera_losses(feature, known, batch.index) * by_camera}
            nothing = feature.new_zeros(feature.shape[:2])
            losses |= {"identity": nothing, "instance": nothing}
            if self._begun:
                losses["identity"] = self._identity_losses(feature, known) * by_camera
                if self._weights["instance"]:
                    share = (row != OUTLIER) / (len(row) * len(row))  # once more than a mean
                    losses["instance"] = self._instance_losses(feature, batch.index) * share
        named = {}
        for name, value in losses.items():
            total = self._weights.get(name, 1.0) * value.sum(1)
            named[f"global_{name}"] = total[0]
            if len(total) > 1:
                named[f"part_{name}"] = self._part_weight * total[1:].mean()
        return named

    def _camera_losses(self, feature: Tensor, row: Tensor, index: Tensor) -> Tensor:
        """(1 + K, B)."""
        logits = self.memory.similarity(feature) / self._temperature
        rival = self.row_to_camera == self.row_to_camera[row][:, None]
        logits = logits.masked_fill(~rival, -torch.inf)
        if not self._soft:
            return (
                logits.logsumexp(2)
                - logits.gather(2, row.expand(len(logits), -1)[..., None])[..., 0]
            )
        weight = self._side[CAMERA_WEIGHT][index][:, self.place].to(feature.dtype)
        target = (weight / self._temperature).masked_fill(~rival, -torch.inf).softmax(1)
        # 0 * -inf is not a number
        return logits.logsumexp(2) - (target * logits.masked_fill(~rival, 0)).sum(2)

    def _identity_losses(self, feature: Tensor, row: Tensor) -> Tensor:
        """(1 + K, B)."""
        similarity = self._start.similarity(feature.detach())
        choice = choose_offline(
            similarity, self.proxy_to_cluster[row], self._clusters, self._num_negatives
        )
        logits = self._start.similarity_to(feature, choice.proxies) / self._temperature
        return even_nce(logits, choice)

    def _instance_losses(self, feature: Tensor, index: Tensor) -> Tensor:
        """(1 + K, B)."""
        near, relevant = self._side[NEAREST][index].long(), self._side[RELEVANT][index]
        similarity = torch.einsum("mbd,nmd->mbn", feature, self.instances.to(feature.dtype))
        scores = similarity.gather(2, near.expand(len(feature), -1, -1))
        return torch.stack(
            [
                torch.stack(
                    [
                        missing_precision(score, wanted, self._anneal)
                        for score, wanted in zip(bank, relevant, strict=True)
                    ]
                )
                for bank in scores
            ]
        )


def missing_precision(score: Tensor, relevant: Tensor, anneal: float) -> Tensor:
    """1 - the smooth average precision of a ranking; 0 if nothing is relevant.

    Brown et al., *Smooth-AP* (ECCV 2020): an item's rank is 1 + the sum over the others of
    sigmoid((their score - its score) / anneal); the precision at a relevant item is its rank among
    the relevant ones over its rank among all. The backward pass computes the L x L steps again
    instead of keeping them: 4 MB for 1,000 items.

    Args:
        score: (L,).
        relevant: (L,) bool.
        anneal: Width of the smooth step.

    Returns:
        ().
    """
    if not score.requires_grad:
        return _missing_precision(score, relevant, anneal)
    result: Tensor = checkpoint(
        _missing_precision, score, relevant, anneal, use_reentrant=False, preserve_rng_state=False
    )
    return result


def _missing_precision(score: Tensor, relevant: Tensor, anneal: float) -> Tensor:
    difference = (score - score[:, None]) / anneal
    step = difference.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).sigmoid()
    wanted = relevant.to(score.dtype)
    # An item's step over itself is 1 / 2.
    precision = (0.5 + step @ wanted) / (0.5 + step.sum(1))
    count = wanted.sum()
    return torch.where(count > 0, 1 - (precision * wanted).sum() / count.clamp(min=1), 0.0)
