"""Epochs of several passes over the clusters."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from reid.data.samplers import BatchSize, IntArray, PKSampler
from reid.registry import SAMPLER, Range


@SAMPLER.register()
class PassSampler(PKSampler):
    """Every cluster once in a pass, with a few of its images; an epoch is many passes.

    As in SSG's code: a cluster with too few images repeats some at random, and clusters at the end
    of a pass that do not fill a batch are left out. If there are fewer clusters than a batch takes,
    they come more than once in it, so that an epoch is never empty.

    Args:
        batch_size: Images in a batch, over all processes.
        images_per_identity: Images of a cluster in a batch.
        passes: In an epoch.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes; each takes `batch_size / world_size` images of a batch.

    Raises:
        ValueError: The numbers do not fit each other.
    """

    def __init__(
        self,
        batch_size: BatchSize,
        images_per_identity: int = 4,
        passes: Annotated[int, Range(1, 100_000)] = 70,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, images_per_identity, 0, seed, rank, world_size)
        if passes < 1:
            raise ValueError(f"passes: expected 1 or more, got {passes}")
        self._num_passes = passes

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._num_passes * super().__len__()

    def _pick(self, group: IntArray, rng: np.random.Generator) -> IntArray:
        count = self._images_per_group
        return rng.choice(group, count, replace=len(group) < count)
