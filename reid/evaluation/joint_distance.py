"""Distances by appearance and time, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reid.evaluation.time_histograms import Doubles, Integers, TimeHistograms, joint_score
from reid.structures import FeatureSet

_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class JointDistance:
    """1 - likeness by appearance and time (MGH, equation 1; st-ReID, equation 7).

    Attributes:
        features: (N, D) unit vectors, on the device that multiplies them.
        camids: (N,).
        frames: (N,).
        model: Smoothed histograms of times between cameras.
        alpha: See `joint_score`.
    """

    features: Tensor
    camids: Integers
    frames: Integers
    model: TimeHistograms
    alpha: float = 5.0

    def columns(self, images: Integers) -> Doubles:
        """Distances d(k, i) of all images k to some images i, as rows (n, N).

        They differ from d(i, k) only where two frames are equal.
        """
        which = torch.from_numpy(images).to(self.features.device)
        cosine = (self.features[which] @ self.features.T).clamp(-1, 1).double().cpu().numpy()
        share = self.model.shares(
            self.camids, self.frames, self.camids[images], self.frames[images]
        )
        return 1 - joint_score(cosine, share.T, self.alpha)

    @classmethod
    def of(cls, features: FeatureSet, model: TimeHistograms, alpha: float = 5.0) -> JointDistance:
        """The distance among images, by their test features, cameras and frames."""
        camids, frames = features.camids.cpu().numpy(), features.frames.cpu().numpy()
        return cls(features.test, camids, frames, model, alpha)


def joint_blocks(
    query: FeatureSet, gallery: FeatureSet, model: TimeHistograms, alpha: float = 5.0
) -> Iterator[tuple[int, Doubles]]:
    """1 - likeness by appearance and time of queries to a gallery, in blocks of about 64 MB.

    Args:
        query: Q images with unit test features, cameras and frames.
        gallery: G images.
        model: Smoothed histograms of times between cameras.
        alpha: See `joint_score`.

    Yields:
        Pairs (start, distances (b, G)): the distances of the queries from `start` on.
    """
    camids, frames = (x.cpu().numpy() for x in (query.camids, query.frames))
    others, times = (x.cpu().numpy() for x in (gallery.camids, gallery.frames))
    height = max(1, _BLOCK_BYTES // (8 * max(1, len(gallery))))
    for start in range(0, len(query), height):
        rows = slice(start, start + height)
        cosine = query.test[rows] @ gallery.test.T
        share = model.shares(camids[rows], frames[rows], others, times)
        yield start, 1 - joint_score(cosine.double().cpu().numpy(), share, alpha)


def join(first: FeatureSet, second: FeatureSet) -> FeatureSet:
    """The images of both sets, one after the other, by their test features."""
    names = ("pids", "camids", "frames")
    columns = {name: torch.cat((getattr(first, name), getattr(second, name))) for name in names}
    return FeatureSet.of(torch.cat((first.test, second.test)), **columns)
