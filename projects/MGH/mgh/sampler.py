"""MGH's sampler, with the loss of batches of the published one as an option."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reid.data.samplers import BatchSize, ProxyBalancedSampler
from reid.registry import SAMPLER

_MOST_EMPTY_PASSES = 1000


@SAMPLER.register()
class MGHSampler(ProxyBalancedSampler):
    """Batches of proxies x images of each, as in MGH.

    The published sampler gives a proxy of a single image one place in the batch instead of
    `images_per_proxy`, and hands a batch out only when it has exactly `batch_size` images. So such
    a proxy shifts the rest of the pass off the grid: unless these proxies come in fours, all of it
    is thrown away. With 3000 proxies of which 2 % have one image, a pass gives 13 batches instead
    of 375. By default a proxy of one image is repeated instead, and no batch is lost.

    Args:
        batch_size: Images in a batch, over all processes.
        images_per_proxy: Z, images of one proxy in a batch.
        steps_per_epoch: Batches in an epoch. 0: as many as one pass fills; None: enough for all
            labelled images; at least one in both cases.
        lose_batches: Loses batches as the published sampler does.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes; each takes `batch_size / world_size` images of a batch.

    Raises:
        ValueError: The numbers do not fit each other.
    """

    def __init__(
        self,
        batch_size: BatchSize,
        images_per_proxy: int = 4,
        steps_per_epoch: int | None = 400,
        lose_batches: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, images_per_proxy, steps_per_epoch, seed, rank, world_size)
        self._lose_batches = lose_batches

    def _images(self, rng: np.random.Generator) -> Iterator[int]:
        return self._published_images(rng) if self._lose_batches else super()._images(rng)

    def _published_images(self, rng: np.random.Generator) -> Iterator[int]:
        """The images of the batches that are not lost, pass after pass.

        Raises:
            ValueError: 1000 passes gave no batch.
        """
        empty_passes = 0
        while empty_passes < _MOST_EMPTY_PASSES:
            empty_passes += 1
            waiting: list[int] = []
            for number in rng.permutation(len(self._groups)):
                group = self._groups[number]
                waiting += (group if len(group) == 1 else self._pick(group, rng)).tolist()
                if len(waiting) == self.batch_size:
                    yield from waiting
                    waiting, empty_passes = [], 0
        raise ValueError(
            f"MGHSampler: {_MOST_EMPTY_PASSES} passes over {len(self._groups):,} proxies filled no "
            f"batch of {self.batch_size} exactly; set dataloader.sampler.lose_batches to false"
        )
