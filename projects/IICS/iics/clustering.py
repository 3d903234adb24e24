"""IICS's distances and clusters: similar class scores, re-ranking, average linkage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from reid.labelling.linkage import (
    Floats,
    average_linkage,
    cut_below,
    cut_to_clusters,
    distance_at_share,
    fill_upper_triangle,
    pair_matrix,
)
from reid.neighbors import Labels, rerank_distances
from reid.projects.iics.loss import ClusterCrossEntropy
from reid.structures import FeatureSet, ProgressBar, PseudoLabels

logger = logging.getLogger(__name__)

_BLOCK = 1024
_GROUP = 8192  # a multiple of _BLOCK

SmallCameras = Literal["published", "alone"]
Scores = Callable[[slice], Sequence[Tensor]]
"""The class probabilities (n, classes) of each classifier for a range of n images."""


def class_similarity(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """S_ij = sum min(v_i, v_j) / sum max(v_i, v_j) of all class probabilities of two images.

    Xuan & Zhang (CVPR 2021), as in their code: the Jaccard similarity of the scores of all cameras'
    classifiers. As min + max = a + b, it follows from the sum of minima alone.

    Args:
        first: (A, classes) for each classifier.
        second: (B, classes) for each classifier.

    Returns:
        (A, B).
    """
    shared = first[0].new_zeros(len(first[0]), len(second[0]))
    total = shared.clone()
    for a, b in zip(first, second, strict=True):
        both = a.sum(1)[:, None] + b.sum(1)
        total += both
        if a.device.type == "cpu":  # five times as fast as cdist
            _add_minima(a.numpy(), b.numpy(), shared.numpy())
        else:
            shared += (both - torch.cdist(a, b, p=1)) / 2
    return shared / (total - shared)


@njit(parallel=True, fastmath=True, cache=True)
def _add_minima(first: Floats, second: Floats, sums: Floats) -> None:
    """Adds sum_k min(first_ik, second_jk) to (A, B) sums."""
    for i in prange(len(first)):
        for j in range(len(second)):
            total = np.float32(0)
            for k in range(first.shape[1]):
                one, other = first[i, k], second[j, k]
                total += one if one < other else other
            sums[i, j] += total


def fill_distances(
    matrix: Floats,
    unit: Tensor,
    camids: Tensor | None = None,
    scores: Scores | None = None,
    mix: float = 0.0,
) -> None:
    """Fills in d_ij = 1 - cos - mix [cam_i != cam_j] S_ij, block by block.

    The class scores of at most two groups of 8,192 images exist at a time: 0.6 GB with 15 cameras
    of 600 classes. At 32,621 images each group's are computed two to four times.

    Args:
        matrix: (N, N).
        unit: (N, D), of unit length.
        camids: (N,) cameras; needed with `scores`.
        scores: Gives the class probabilities; needed if `mix` is above 0.
        mix: mu, the weight of the similarity S.
    """
    groups = [slice(*ends) for ends in _ranges(0, len(unit), _GROUP)]
    mixes = scores is not None and mix > 0
    for number, group in enumerate(groups):
        first = scores(group) if scores is not None and mixes else ()
        for other in groups[number:]:
            second = scores(other) if scores is not None and mixes and other != group else first
            for rows, columns in _block_pairs(group, other):
                block = 1 - unit[rows] @ unit[columns].T
                if mixes and camids is not None:
                    similar = class_similarity(
                        [part[rows.start - group.start :][: len(block)] for part in first],
                        [part[columns.start - other.start :][: block.shape[1]] for part in second],
                    )
                    block -= mix * (camids[rows, None] != camids[columns]) * similar
                values = block.cpu().numpy()
                matrix[rows, columns] = values
                matrix[columns, rows] = values.T
            del second  # before the next group's are made


def _block_pairs(group: slice, other: slice) -> Iterator[tuple[slice, slice]]:
    """The blocks of the pairs of two groups; of a group with itself, no pair of blocks twice."""
    for rows in _ranges(group.start, group.stop, _BLOCK):
        for columns in _ranges(max(other.start, rows[0]), other.stop, _BLOCK):
            yield slice(*rows), slice(*columns)


def _ranges(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """The ranges of at most `length` that make up a range."""
    for first in range(start, stop, length):
        yield first, min(first + length, stop)


@dataclass(frozen=True)
class Linkage:
    """How a distance becomes clusters: re-ranking, then average linkage to a number or a limit.

    Attributes:
        clusters: How many clusters; every image is one if there are no more of them.
        share: In place of `clusters`: merges happen at distances below the entry at this share of
            all distances above 0 in ascending order.
        k1: See `rerank_distances`.
        k2: See `rerank_distances`.
        lambda_value: See `rerank_distances`.
    """

    clusters: int
    share: float | None = None
    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3

    def cut(
        self, matrix: Floats, clusters: int = 0, progress: ProgressBar | None = None
    ) -> tuple[Labels, float]:
        """Clusters (N,) from 0 and, with a share, the limit (else 0).

        Args:
            matrix: (N, N) symmetric distances; used up.
            clusters: In place of the attribute.
            progress: Called with (images' worth of work done, N).
        """
        if len(matrix) == 1:
            return np.zeros(1, np.int64), 0.0
        self.rerank(matrix, progress)
        limit = 0.0 if self.share is None else distance_at_share(matrix, self.share)
        merges = average_linkage(matrix)
        if self.share is not None:
            return cut_below(merges, limit), limit
        return cut_to_clusters(merges, clusters or self.clusters), limit

    def rerank(self, matrix: Floats, progress: ProgressBar | None = None) -> None:
        """Re-ranks distances in place; of the result, which is not symmetric, i < j counts."""
        reranked = rerank_distances(
            lambda images: matrix[images].astype(np.float64),
            len(matrix),
            k1=self.k1,
            k2=self.k2,
            lambda_value=self.lambda_value,
            progress=progress,
        )
        fill_upper_triangle(matrix, reranked.rows)


@dataclass(frozen=True)
class IntraCameraClusters:
    """Clusters of each camera alone (stage 1 of IICS).

    Attributes:
        linkage: Makes them.
        small_cameras: What a camera with fewer images than clusters gets. `published`: half as many
            clusters as it has images, which are taken twice for that; and no later camera, in the
            order of the images, gets more clusters than it. `alone`: half as many, and no other
            camera is concerned. A camera with one image is one cluster in both cases.
    """

    linkage: Linkage
    small_cameras: SmallCameras = "published"

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images; each cluster is a proxy of its camera."""
        camids = features.camids.cpu()
        cluster = torch.zeros_like(camids)
        clusters, found, done = self.linkage.clusters, 0, 0
        for camera in dict.fromkeys(camids.tolist()):
            rows = (camids == camera).nonzero()[:, 0]
            few = self.linkage.share is None and 1 < len(rows) < clusters
            here = max(1, len(rows) // 2) if few else clusters
            twice = few and self.small_cameras == "published"
            if twice:
                logger.warning(
                    "Camera %d has %d images, fewer than %d: it and all later cameras get no more "
                    "than %d clusters, as in the published code; SMALL_CAMERAS: alone leaves the "
                    "others as they are", camera, len(rows), clusters, here,
                )  # fmt: skip
                clusters = here
            unit = features.test[rows.to(features.test.device)]
            with pair_matrix(len(unit) * (1 + twice)) as matrix:
                fill_distances(matrix, torch.cat((unit, unit)) if twice else unit)
                labels, _ = self.linkage.cut(matrix, here)
            cluster[rows] = found + torch.from_numpy(labels[-len(rows) :])
            found = int(cluster.max()) + 1
            done += len(rows)
            if progress is not None:
                progress(done, len(camids))
        return PseudoLabels.from_clusters(cluster, camids)


@dataclass
class InterCameraClusters:
    """Clusters of all images, drawn together by the scores of the cameras' classifiers (stage 2).

    Attributes:
        linkage: Makes them.
        mix: mu_e, the weight of the similarity of scores.
        heads: Give the scores; needed if `mix` is above 0.
        limit: The limit of the last clusters, if they are made by a share; else 0.
    """

    linkage: Linkage
    mix: float = 0.0
    heads: ClusterCrossEntropy | None = None
    limit: float = 0.0

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images; clusters are split by camera into proxies."""
        scores: Scores | None = None
        heads, raw = self.heads, features.raw
        if heads is not None and self.mix:
            assert raw is not None

            def scores(images: slice) -> list[Tensor]:
                return [*heads.probabilities(raw[images])]

        with pair_matrix(len(features)) as matrix:
            fill_distances(matrix, features.test, features.camids, scores, self.mix)
            labels, self.limit = self.linkage.cut(matrix, progress=progress)
        return PseudoLabels.from_clusters(torch.from_numpy(labels), features.camids.cpu())
