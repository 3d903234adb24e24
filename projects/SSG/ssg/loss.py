"""SSG's triplet losses: positives by position, negatives by the labels of each feature."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from reid.modeling.losses import Loss
from reid.registry import LOSS, Range
from reid.structures import OUTLIER, Batch, Embeddings, FeatureSet, PseudoLabels


@LOSS.register()
class SSGLoss(Loss):
    """The sum of positional triplet losses of the embedding, the whole and each part.

    Fu et al., *Self-similarity Grouping* (ICCV 2019), as in the published code; see
    `positional_triplet`. The embedding and the whole take the clusters of the whole, each part its
    own (`PseudoLabels.side`, as `BankClusterer` gives them).

    Published positives go by the place in the batch, so two images of one whole cluster are pulled
    together by their halves too, even if the halves' own clusters differ. With `positives: label`
    they must be of one cluster by each feature.

    The batch must hold the images of a cluster next to each other, `images_per_identity` of each,
    as PK samplers give them. Images of different clusters that share such a group, by another
    sampler, are no positives.

    Args:
        num_parts: K.
        margin: Of the hinge.
        images_per_identity: Images of one cluster that follow each other in a batch.
        positives: By `position` or by `label`; see above.
        parts: Names of the parts' clusters, in the order of the model's banks.

    Raises:
        ValueError: The model has no parts, or a number is out of its range.
    """

    parts: Tensor

    def __init__(
        self,
        num_parts: int = 0,
        margin: Annotated[float, Range(0, 1e6)] = 0.5,
        images_per_identity: Annotated[int, Range(2, 65_536)] = 4,
        positives: Literal["position", "label"] = "position",
        parts: tuple[str, ...] = ("upper", "lower"),
    ) -> None:
        super().__init__()
        if not num_parts:
            raise ValueError(
                "SSGLoss needs a head with parts, such as SelfSimilarityHead; the model's has none"
            )
        if len(parts) != num_parts:
            raise ValueError(
                f"parts: expected a name for each of the model's {num_parts} parts, got {[*parts]}"
            )
        if images_per_identity < 2 or margin < 0:
            raise ValueError(
                "expected images_per_identity of 2 or more and margin of 0 or more, got "
                f"{images_per_identity}, {margin}"
            )
        self._margin = margin
        self._group = images_per_identity
        self._by_label = positives == "label"
        self._names = parts
        self.register_buffer("parts", torch.zeros(num_parts, 0, dtype=torch.int64), False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch.

        Raises:
            ValueError: The parts have no clusters of their own.
        """
        missing = [name for name in self._names if name not in labels.side]
        if missing:
            raise ValueError(
                f"SSGLoss: the labels have no clusters by {', '.join(missing)}; set the clusterer "
                f"BankClusterer with NAMES {[*self._names]} around another"
            )
        super().set_labels(labels, features)
        self.parts = torch.stack([labels.side[name] for name in self._names])

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`embedding`, `whole` and one value by the name of each part.

        Raises:
            ValueError: The batch is no multiple of `images_per_identity`.
        """
        if len(batch.index) % self._group:
            raise ValueError(
                f"SSGLoss: expected a batch of groups of {self._group} images of one cluster, got "
                f"{len(batch.index)} images; images_per_identity must be the sampler's"
            )
        whole = self.cluster[batch.index]
        pairs = group_pairs(whole, self._group)
        banks = [embeddings.post[:, 0], *embeddings.pre.unbind(1)]
        labels = [whole, whole, *self.parts[:, batch.index]]
        names = ("embedding", "whole", *self._names)
        with torch.autocast(whole.device.type, enabled=False):
            return {
                name: positional_triplet(bank, label, pairs, self._margin, same=self._by_label)
                for name, bank, label in zip(names, banks, labels, strict=True)
            }


def group_pairs(label: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """All ordered pairs of places in each group of images that follow each other.

    Args:
        label: (B,) cluster of each image, -1 = none; B is a multiple of `size`.
        size: Images in a group.

    Returns:
        Places (P,) of the earlier image and of the later one, and whether both are of one cluster.
    """
    groups = len(label) // size
    first, second = torch.triu_indices(size, size, 1, device=label.device)
    start = size * torch.arange(groups, device=label.device)[:, None]
    one, other = (start + first).flatten(), (start + second).flatten()
    return one, other, (label[one] == label[other]) & (label[one] != OUTLIER)


def positional_triplet(
    feature: Tensor,
    label: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
    margin: float,
    *,
    same: bool = False,
) -> Tensor:
    """SSG's triplet loss: each pair of places, and the nearest image of another label.

    The mean over the pairs (j, q) of max(0, |x_j - x_q| - min |x_j - x_n| + margin), n over the
    images whose label is not j's. Labels choose the negatives only: two images of a pair may have
    different ones. The later image of a pair is no anchor in it. Pairs whose anchor has no negative
    do not count; in the published code they are an error.

    Args:
        feature: (B, D), not normalised.
        label: (B,) by this feature, -1 = left out.
        pairs: See `group_pairs`.
        margin: Of the hinge.
        same: Pairs with different labels do not count either.

    Returns:
        The mean; 0, with a gradient of 0, if no pair counts.
    """
    if feature.dtype != torch.float64:
        feature = feature.float()
    squared = feature.square().sum(1)
    distance = (squared[:, None] + squared - 2 * feature @ feature.T).clamp(min=1e-12).sqrt()
    labelled = label != OUTLIER
    foreign = (label[:, None] != label) & labelled
    negative = distance.masked_fill(~foreign, torch.inf).amin(1)
    one, other, of_cluster = pairs
    valid = of_cluster & labelled[one] & labelled[other] & foreign.any(1)[one]
    if same:
        valid &= label[one] == label[other]
    difference = torch.where(valid, distance[one, other] - negative[one] + margin, 0)
    return difference.clamp(min=0).sum() / valid.sum().clamp(min=1)
