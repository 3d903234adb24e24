"""SpCL's sampler: a label of one image gives one image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reid.data.samplers import CrossCameraSampler, IntArray
from reid.registry import SAMPLER


@SAMPLER.register()
class MultiGallerySampler(CrossCameraSampler):
    """A stream of K images of each label in turn, cut into batches (SpCL, NeurIPS 2020).

    A label of one image gives that image once; the others give K images as in `CrossCameraSampler`.
    So while most images are un-clustered, a batch has few labels with K images. Images at the end
    of a pass that do not fill a batch are left out, unless a whole pass fills none. The arguments
    are those of `PKSampler`.
    """

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self._steps_per_epoch == 0:
            self._check_labels()
            size = self._images_per_group
            images = sum(1 if len(group) == 1 else size for group in self._groups)
            return max(1, images // self.batch_size)
        return super().__len__()

    def _images(self, rng: np.random.Generator) -> Iterator[int]:
        images: list[int] = []
        while True:
            full = False
            for number in rng.permutation(len(self._groups)):
                images += self._pick(self._groups[number], rng).tolist()
                while len(images) >= self.batch_size:
                    yield from images[: self.batch_size]
                    images, full = images[self.batch_size :], True
            if full:
                images = []

    def _pick(self, group: IntArray, rng: np.random.Generator) -> IntArray:
        return group if len(group) == 1 else super()._pick(group, rng)
