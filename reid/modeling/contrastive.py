"""Contrast with a memory: which proxies a sample is compared with, and its loss.

Pure functions of the similarities to all rows of a memory, for all banks and samples at once.
Shapes: M banks, B samples, P rows (clusters or proxies), D dimensions. The choice of proxies
carries no gradient.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Average = Literal["batch", "camera"]


class Choice(NamedTuple):
    """The proxies that a sample is compared with.

    Attributes:
        proxies: (M, B, n) int64.
        positive: (M, B, n) bool.
        valid: (M, B, n) bool; false entries are padding, which does not count.
    """

    proxies: Tensor
    positive: Tensor
    valid: Tensor


class ProxyGroups(nn.Module):
    """Proxies by cluster or by camera, as slices of one list.

    Args:
        group: (P,) the group of each proxy; gaps and -1 are allowed.

    Attributes:
        order: (P,) proxies, group after group.
        start: (groups,) where each group begins in `order`.
        size: (groups,) number of proxies in each group.
        sizes: The same as Python numbers, so that reading them never synchronises a GPU.
    """

    order: Tensor
    start: Tensor
    size: Tensor

    def __init__(self, group: Tensor) -> None:
        super().__init__()
        dense = torch.unique(group, return_inverse=True)[1]
        size = torch.bincount(dense)
        self.register_buffer("order", dense.argsort(stable=True), persistent=False)
        self.register_buffer("start", size.cumsum(0) - size, persistent=False)
        self.register_buffer("size", size, persistent=False)
        self.sizes: list[int] = size.tolist()

    def maxima(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """The most similar proxy of each group: its similarity and its number (M, B, groups).

        Args:
            similarity: (M, B, P).
        """
        if similarity.device.type == "cpu":
            from reid.modeling.group_maxima import group_maxima  # a GPU needs no numba

            return group_maxima(similarity, self.order, self.start)
        by_group = torch.split(similarity.index_select(2, self.order), self.sizes, 2)
        best = [values.max(2) for values in by_group]
        place = torch.stack([group.indices for group in best], 2) + self.start
        return torch.stack([group.values for group in best], 2), self.order[place]


def info_nce(logits: Tensor, row: Tensor, rival: Tensor | None = None) -> Tensor:
    """Cross entropy of a sample's own row among all rows (InfoNCE).

    -z_y + log sum_k exp z_k (Dai et al., *Cluster Contrast*, ACCV 2022).

    Args:
        logits: (M, B, P) similarities divided by the temperature.
        row: (B,) the row of each sample, y.
        rival: (B, P) bool, the rows in the sum, y among them; None: all rows.

    Returns:
        (M, B).
    """
    positive = logits.gather(2, row.expand(len(logits), -1)[..., None])[..., 0]
    if rival is not None:
        logits = logits.masked_fill(~rival, -torch.inf)
    return logits.logsumexp(2) - positive


def floored_log_softmax(logits: Tensor, floor: float = 1e-6) -> Tensor:
    """log(p + floor) with p_k = exp z_k / (sum_j exp z_j + floor).

    The softmax of SpCL and RLCC. Both floors count in the gradient, and -log(p + floor) is at most
    -log(floor), 13.8 for 1e-6. Large logits do not overflow.

    Args:
        logits: (..., P) z, in single or double precision.
        floor: Above 0.
    """
    total = logits.logsumexp(-1, keepdim=True)
    total = torch.logaddexp(total, torch.full_like(total, math.log(floor)))
    return ((logits - total).exp() + floor).log()


def even_nce(logits: Tensor, choice: Choice) -> Tensor:
    """Cross entropy between the softmax over a choice and an even target on its positives.

    -1/|A| sum_{a in A} log (exp z_a / sum_{k in A + N} exp z_k) (Wang et al., *CAP*, AAAI 2021;
    O2CAP, TIP 2022; TMGF, equations 7 and 8).

    Args:
        logits: (M, B, n) of the chosen proxies.
        choice: Positives A and negatives N.

    Returns:
        (M, B).
    """
    total = logits.masked_fill(~choice.valid, -torch.inf).logsumexp(2)
    return total - (logits * choice.positive).sum(2) / choice.positive.sum(2)


@torch.no_grad()
def choose_offline(
    similarity: Tensor, cluster: Tensor, clusters: ProxyGroups, count: int
) -> Choice:
    """All proxies of a sample's cluster, and the most similar other proxies (CAP, O2CAP).

    Args:
        similarity: (M, B, P) to the samples.
        cluster: (B,) of the samples.
        clusters: The proxies by cluster.
        count: Number of negatives; all other proxies if there are fewer.
    """
    place = torch.arange(max(clusters.sizes), device=cluster.device)
    valid = place < clusters.size[cluster][:, None]
    # Padding repeats the cluster's first proxy, which is a positive itself.
    proxies = clusters.order[clusters.start[cluster][:, None] + torch.where(valid, place, 0)]
    banks = len(similarity)
    return _with_hardest(
        similarity, proxies.expand(banks, -1, -1), valid.expand(banks, -1, -1), count
    )


@torch.no_grad()
def choose_online(
    similarity: Tensor, cameras: ProxyGroups, num_positives: int, count: int
) -> Choice:
    """The best among each camera's best proxy, and the most similar other proxies (O2CAP).

    Args:
        similarity: (M, B, P) by which proxies are chosen.
        cameras: The proxies by camera.
        num_positives: Number of positives; at most one for each camera that has proxies.
        count: Number of negatives; all other proxies if there are fewer.
    """
    values, best = cameras.maxima(similarity)
    chosen = values.topk(min(num_positives, len(cameras.sizes)), 2).indices
    proxies = best.gather(2, chosen)
    return _with_hardest(similarity, proxies, torch.ones_like(proxies, dtype=torch.bool), count)


def sample_weights(has_loss: Tensor, camera: Tensor, average: Average) -> Tensor:
    """The weight of each sample's loss in the batch.

    Args:
        has_loss: (B,) bool, whether a sample has a row in the memory, and so a loss.
        camera: (B,) of the samples.
        average: `batch`: the mean over all samples. `camera`: the mean over each camera's samples,
            summed over the batch's cameras, so an image of a rare camera counts more (CAP, O2CAP).

    Returns:
        (B,), 0 where a sample has no loss.
    """
    together = camera[:, None] == camera if average == "camera" else torch.ones_like(has_loss)
    return has_loss / (together & has_loss).sum(-1).clamp(min=1)


def _with_hardest(similarity: Tensor, positives: Tensor, valid: Tensor, count: int) -> Choice:
    """The positives, and the most similar proxies that are not positives."""
    # Hiding the positives for a moment is cheaper than a copy of all similarities.
    hidden = similarity.gather(2, positives)
    similarity.scatter_(2, positives, -torch.inf)
    values, negatives = similarity.topk(min(count, similarity.shape[2]), 2, sorted=False)
    similarity.scatter_(2, positives, hidden)
    exist = values > -torch.inf
    return Choice(
        torch.cat((positives, negatives), 2),
        torch.cat((valid, torch.zeros_like(exist)), 2),
        torch.cat((valid, exist), 2),
    )
