"""Batches with as many images of every camera."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from torch import Tensor

from reid.data.samplers import IntArray, LabelledSampler
from reid.registry import SAMPLER, Range
from reid.structures import OUTLIER, PseudoLabels


@SAMPLER.register()
class EveryCameraSampler(LabelledSampler):
    """A few images of each camera in every batch, camera after camera (stage 1 of IICS).

    Xuan & Zhang (CVPR 2021), as in their code: in an epoch, each camera's images come in random
    order, each at most once; the epoch ends when a camera has too few left. Here cameras with fewer
    images than a batch takes do not count for that, and come with repetitions; in the published
    code one such camera ends the training. Cameras are those of the labels' proxies; all images
    without a camera are one camera.

    Args:
        images_per_camera: Images of each camera in a batch; with that many
            `MODEL.BN_SAMPLES_PER_GROUP`, BatchNorm sees one camera at a time.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes; each takes an equal share of a batch, or one image more or less.

    Attributes:
        batch_size: Images in a batch, over all processes; `images_per_camera` until the labels tell
            how many cameras there are.
    """

    def __init__(
        self,
        images_per_camera: Annotated[int, Range(1, 65_536)] = 8,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(images_per_camera, images_per_camera, 0, seed, 0, 1)
        self._rank = rank
        self._world_size = world_size

    def group_ids(self, labels: PseudoLabels) -> Tensor:
        """The cameras, from 0; unknown ones are 0, the others one more than their number."""
        proxy = labels.proxy.clamp(min=0)
        return (labels.proxy_to_camera[proxy] + 1).masked_fill(labels.proxy == OUTLIER, OUTLIER)

    def set_labels(self, labels: PseudoLabels) -> None:
        """Takes the labels of an epoch.

        Raises:
            ValueError: No image has a label.
        """
        super().set_labels(labels)
        self.batch_size = self._images_per_group * len(self._groups)
        bounds = [self.batch_size * (self._rank + i) // self._world_size for i in (0, 1)]
        self._share = slice(*bounds)

    def __len__(self) -> int:
        """Batches in an epoch."""
        self._check_labels()
        passes = [len(group) // self._images_per_group for group in self._groups]
        return min((count for count in passes if count), default=1)

    def _images(self, rng: np.random.Generator) -> Iterator[int]:
        orders = [self._order(group, rng) for group in self._groups]
        size = self._images_per_group
        for step in range(len(self)):
            for order in orders:
                yield from order[step * size : (step + 1) * size]

    def _order(self, group: IntArray, rng: np.random.Generator) -> IntArray:
        """A camera's images of an epoch; with repetitions if they are too few for its batches."""
        needed = len(self) * self._images_per_group
        passes = -(-needed // len(group))
        return np.concatenate([rng.permutation(group) for _ in range(passes)])[:needed]
