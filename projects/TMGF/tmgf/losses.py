"""Offline and online camera-aware proxy losses on the global feature and on parts."""

from __future__ import annotations

import torch
from torch import Tensor

from reid.modeling.losses import Loss
from reid.registry import LOSS
from reid.structures import OUTLIER, Batch, Embeddings, FeatureSet, PseudoLabels
from tmgf.memory import ProxyMemory


@LOSS.register()
class O2CAPLoss(Loss):
    """TMGF's losses (section 3.3, equations 6 to 9), with means over the batch for sums.

    Each bank of the memory has losses of its own, with its own choice of proxies:

    - offline: positives are all proxies of the sample's cluster; negatives the most similar others;
    - online: by `balance` * similarity to the feature + (1 - `balance`) * similarity to the
      feature's own proxy, the best proxy of each camera is found; the best of these are the
      positives, whatever their cluster; negatives are the most similar others.

    A loss is the cross entropy between the softmax over positives and negatives and an even target
    on the positives. Total: global offline + global online + `part_weight` * mean over the parts.
    Samples without a proxy are left out. The memory is updated after the losses of a batch.

    Args:
        temperature: tau.
        momentum: Share of a memory entry that an update keeps (mu).
        balance: Weight of the feature's own similarity in the online choice.
        part_weight: lambda_p.
        num_positives: Online positives; no more than there are cameras.
        num_negatives: Negatives; all others where there are fewer.

    Raises:
        ValueError: A number is out of its range.
    """

    needs_features = True
    proxy: Tensor
    proxy_to_cluster: Tensor
    proxy_to_camera: Tensor

    def __init__(
        self,
        temperature: float = 0.07,
        momentum: float = 0.2,
        balance: float = 0.15,
        part_weight: float = 0.1,
        num_positives: int = 3,
        num_negatives: int = 50,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        if not 0 <= balance <= 1:
            raise ValueError(f"balance: expected 0 <= balance <= 1, got {balance}")
        if part_weight < 0:
            raise ValueError(f"part_weight: expected 0 or more, got {part_weight}")
        if num_positives < 1 or num_negatives < 1:
            raise ValueError(
                "expected num_positives and num_negatives of 1 or more, got "
                f"{num_positives}, {num_negatives}"
            )
        self._temperature = temperature
        self._balance = balance
        self._part_weight = part_weight
        self._num_positives = num_positives
        self._num_negatives = num_negatives
        self.memory = ProxyMemory(momentum)
        for name in ("proxy", "proxy_to_cluster", "proxy_to_camera"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        """Takes the labels of an epoch and fills the memory.

        Raises:
            ValueError: Features are missing.
        """
        if features is None:
            raise ValueError("O2CAPLoss: set_labels needs the features of the training images")
        super().set_labels(labels, features)
        self.proxy = labels.proxy
        self.proxy_to_cluster = labels.proxy_to_cluster
        # Cameras that have a proxy, numbered without gaps.
        self.proxy_to_camera = torch.unique(labels.proxy_to_camera, return_inverse=True)[1]
        self.memory.reset(labels.proxy, labels.num_proxies, features)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        """`global_offline`, `global_online`, `part_offline`, `part_online`, ready to be added up.

        The last two are there only if the model has parts.
        """
        with torch.autocast(embeddings.global_feat.device.type, enabled=False):
            return self._losses(embeddings, batch)

    def _losses(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        proxy = self.proxy[batch.index]
        kept = proxy != OUTLIER
        proxy = proxy[kept]
        both = torch.cat((embeddings.global_feat[:, None], embeddings.part_feats), 1).float()
        feature = both[kept].transpose(0, 1)  # (1 + K, B, D)
        if not len(proxy):
            zero = both.sum() * 0
            offline = online = zero.expand(len(feature))
        else:
            scores = feature @ self.memory.bank.transpose(1, 2)  # (1 + K, B, P)
            offline = self._offline(scores, proxy)
            online = self._online(scores, proxy)
        self.memory.update(proxy, feature)
        losses = {"global_offline": offline[0], "global_online": online[0]}
        if len(feature) > 1:
            losses["part_offline"] = self._part_weight * offline[1:].mean()
            losses["part_online"] = self._part_weight * online[1:].mean()
        return losses

    def _offline(self, scores: Tensor, proxy: Tensor) -> Tensor:
        """(1 + K,) mean losses, equation 7."""
        positive = self.proxy_to_cluster == self.proxy_to_cluster[proxy][:, None]  # (B, P)
        logits = scores / self._temperature
        negatives = self._hardest(scores, positive)
        log_total = torch.cat(
            (logits.masked_fill(~positive, -torch.inf), _pick(logits, negatives)), 2
        ).logsumexp(2)
        mean_positive = (logits * positive).sum(2) / positive.sum(1)
        return (log_total - mean_positive).mean(1)

    def _online(self, scores: Tensor, proxy: Tensor) -> Tensor:
        """(1 + K,) mean losses, equation 8."""
        with torch.no_grad():
            to_own = self.memory.bank[:, proxy] @ self.memory.bank.transpose(1, 2)
            similarity = self._balance * scores + (1 - self._balance) * to_own
            best = _best_of_groups(similarity, self.proxy_to_camera)  # (1 + K, B, cameras)
            count = min(self._num_positives, best.shape[2])
            chosen = similarity.gather(2, best).topk(count, 2).indices
            positives = best.gather(2, chosen)
            mask = torch.zeros_like(similarity, dtype=torch.bool).scatter_(2, positives, True)
            negatives = self._hardest(similarity, mask)
        logits = scores / self._temperature
        positive_logits = logits.gather(2, positives)
        log_total = torch.cat((positive_logits, _pick(logits, negatives)), 2).logsumexp(2)
        return (log_total - positive_logits.mean(2)).mean(1)

    def _hardest(self, similarity: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Proxies (1 + K, B, n) most similar among those that are not positive, and which are."""
        count = min(self._num_negatives, similarity.shape[2])
        others = similarity.detach().masked_fill(positive, -torch.inf)
        values, proxies = others.topk(count, 2)
        return proxies, values > -torch.inf


def _pick(logits: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
    """Logits of the chosen proxies; those that are no negatives count nothing."""
    proxies, valid = chosen
    return logits.gather(2, proxies).masked_fill(~valid, -torch.inf)


def _best_of_groups(values: Tensor, group: Tensor) -> Tensor:
    """Which of P has the largest value in each group; the first of equals.

    Args:
        values: (..., P).
        group: (P,) from 0 without gaps.

    Returns:
        (..., groups) int64.
    """
    groups = int(group.max()) + 1
    index = group.expand_as(values)
    largest = values.new_full((*values.shape[:-1], groups), -torch.inf)
    largest.scatter_reduce_(-1, index, values, "amax")
    count = values.shape[-1]
    place = torch.arange(count, device=values.device).expand_as(values)
    place = place.masked_fill(values != largest.gather(-1, index), count)
    first = torch.full_like(largest, count, dtype=torch.int64)
    return first.scatter_reduce_(-1, index, place, "amin")
