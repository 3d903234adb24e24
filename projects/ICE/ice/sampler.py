"""ICE's sampler: a cluster shows as many cameras as it can."""

from __future__ import annotations

import numpy as np

from reid.data.samplers import CrossCameraSampler, IntArray
from reid.registry import SAMPLER


@SAMPLER.register()
class MoreCamerasSampler(CrossCameraSampler):
    """PK batches in which each cluster gives one image of each of its cameras, up to K.

    Chen et al., *ICE* (ICCV 2021), as in the published code. With more than K cameras, K of them
    are chosen at random. With fewer, the cluster's other images fill the places, without repetition
    if there are enough of them. Where there is no other image, all K are drawn with repetition.
    Cameras are known by the proxies of the labels, so clusters must be split by camera, as
    `CameraProxyClusterer` does. The arguments are those of `PKSampler`.
    """

    def _pick(self, group: IntArray, rng: np.random.Generator) -> IntArray:
        count = self._images_per_group
        shuffled = rng.permutation(group)
        # The first image of each camera in a random order is a random one of that camera.
        leads = np.sort(np.unique(self._proxy[shuffled], return_index=True)[1])
        first = shuffled[leads]
        if len(first) >= count:
            return rng.permutation(first)[:count]
        others = np.delete(shuffled, leads)
        if not len(others):
            return rng.choice(group, count)
        rest = count - len(first)
        if len(others) >= rest:
            return np.concatenate((first, others[:rest]))
        return np.concatenate((first, rng.choice(others, rest)))
