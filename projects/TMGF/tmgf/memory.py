"""The proxy memory: one bank of proxy features for the global feature and for each part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid import distributed
from reid.structures import OUTLIER, FeatureSet


class ProxyMemory(nn.Module):
    """(1 + K) banks of P unit vectors, the global bank first.

    Like BatchNorm's statistics, it moves in training mode only, and is no parameter. It is derived
    from the model's features at the start of an epoch, so checkpoints do not hold it.

    Args:
        momentum: Share of the old entry that an update keeps (mu).

    Raises:
        ValueError: The momentum is not in [0, 1].
    """

    bank: Tensor

    def __init__(self, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected 0 <= momentum <= 1, got {momentum}")
        self._momentum = momentum
        self.register_buffer("bank", torch.zeros(0, 0, 0), persistent=False)

    def reset(self, proxy: Tensor, num_proxies: int, features: FeatureSet) -> None:
        """Every entry becomes the normalised mean feature of its proxy's images.

        Args:
            proxy: (N,) proxies of the images, -1 = none.
            num_proxies: P.
            features: Of the N images.
        """
        kept = proxy != OUTLIER
        banks = [
            features.global_feat,
            *(features.part_feats[:, part] for part in range(features.part_feats.shape[1])),
        ]
        # The mean and the sum have the same direction.
        sums = [
            bank.new_zeros((num_proxies, bank.shape[1])).index_add_(0, proxy[kept], bank[kept])
            for bank in banks
        ]
        self.bank = F.normalize(torch.stack(sums), dim=2)

    @torch.no_grad()
    def update(self, proxy: Tensor, feature: Tensor) -> None:
        """K_y <- normalise(mu K_y + (1 - mu) f), sample by sample in batch order (equation 6).

        Samples of different proxies do not touch each other, so that the first sample of every
        proxy is done at once, then the second, and so on. With several processes, samples are taken
        in the order of the whole batch.

        Args:
            proxy: (B,) proxies of the samples, 0 to P - 1.
            feature: (1 + K, B, D) unit vectors.
        """
        if not self.training:
            return
        proxy = distributed.gather_rows(proxy)
        feature = distributed.gather_rows(feature.detach().transpose(0, 1)).transpose(0, 1)
        turn = _occurrence(proxy)
        bank = self.bank.clone()  # the losses' backward needs the old one
        for number in range(int(turn.max()) + 1 if len(turn) else 0):
            now = turn == number
            mixed = self._momentum * bank[:, proxy[now]] + (1 - self._momentum) * feature[:, now]
            bank[:, proxy[now]] = F.normalize(mixed, dim=2)
        self.bank = bank


def _occurrence(ids: Tensor) -> Tensor:
    """(B,) how often each id has come before."""
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    place = torch.arange(len(ids), device=ids.device)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(first, place, 0).cummax(0).values if len(ids) else place
    return torch.empty_like(place).scatter_(0, order, place - start)
