"""Chooses the networks that are clustered and tested."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.engine.trainer import Trainer
from reid.registry import HOOK, ConfigError, Hook
from reid.structures import Batch, Embeddings


@HOOK.register()
class ChooseNetworks(Hook):
    """Clusters and tests some of the run's networks, such as two teachers (MMT).

    Must come after the hooks that create the networks.

    Args:
        cluster: The networks whose features are clustered: their mean if there are several.
        test: The networks that are tested. The first one is saved, and its scores choose the best
            weights. Those of the others are logged and in results.json, as `SET (NETWORK)`.
        normalize: Normalise the mean feature to length 1. Otherwise it is shorter the less the
            networks agree, which only clusterers of averages, such as KMeans, can take.

    Raises:
        ValueError: A list is empty or names a network twice.
    """

    def __init__(
        self, cluster: tuple[str, ...], test: tuple[str, ...], normalize: bool = True
    ) -> None:
        for key, names in (("cluster", cluster), ("test", test)):
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{key}: expected different networks, got {list(names)}")
        self._cluster = cluster
        self._test = test
        self._normalize = normalize

    def before_train(self, trainer: Trainer) -> None:
        """Chooses them.

        Raises:
            ConfigError: A network does not exist.
        """
        networks = {**trainer.students, **trainer.networks}
        unknown = [name for name in (*self._cluster, *self._test) if name not in networks]
        if unknown:
            raise ConfigError(
                f"hooks: ChooseNetworks names {unknown[0]!r}, the run has {', '.join(networks)}; "
                "it must come after the hooks MeanTeacher"
            )
        first, *others = self._test
        trainer.inference_model = networks[first]
        trainer.also_tested = {name: networks[name] for name in others}
        chosen = [networks[name] for name in self._cluster]
        one = len(chosen) == 1
        trainer.clustered_model = chosen[0] if one else MeanNetwork(chosen, self._normalize)


class MeanNetwork(nn.Module):
    """Several networks as one, whose unit and test features are the means of theirs.

    Args:
        networks: Two or more with features of the same shapes; each in its own mode of training.
        normalize: Whether means are normalised.
    """

    def __init__(self, networks: list[nn.Module], normalize: bool = True) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self._normalize = normalize

    def forward(self, batch: Batch) -> Embeddings:
        """The mean embeddings."""
        given: list[Embeddings] = [network(batch) for network in self.networks]
        pre, post = (
            torch.stack([getattr(one, name) for one in given]).mean(0) for name in ("pre", "post")
        )
        unit = self._mean([one.unit for one in given])
        if all(_is_first_bank(one) for one in given):
            return Embeddings(pre, post, unit, unit[:, 0])
        return Embeddings(pre, post, unit, self._mean([one.test for one in given]))

    def _mean(self, features: list[Tensor]) -> Tensor:
        mean = torch.stack(features).mean(0)
        return F.normalize(mean, dim=-1) if self._normalize else mean


def _is_first_bank(given: Embeddings) -> bool:
    return given.test.shape == given.unit[:, 0].shape and bool(
        given.test.data_ptr() == given.unit.data_ptr()
    )
