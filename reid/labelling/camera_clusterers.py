"""Clusters inside each camera, and their merging across cameras."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from reid.labelling.base import Clusterer, ClusteringError
from reid.neighbors import Labels
from reid.registry import CLUSTERER, Range
from reid.structures import OUTLIER, FeatureSet, ProgressBar, PseudoLabels, part_of_progress

logger = logging.getLogger(__name__)

_ROWS = 1024

AffinityRows = Callable[[Labels], npt.NDArray[np.float32]]
"""How alike some clusters (n,) are to all L: (n, L), larger is more alike."""


@CLUSTERER.register()
class CameraClusterer:
    """Clusters the images of each camera alone; optionally cuts clusters at pauses in time.

    Inside a camera, the images of a visit of one person come close in time. A cluster is cut
    wherever the next image, by frame, comes more than `max_gap` frames later; pieces of fewer than
    `min_images` become outliers. Frames are only compared inside one camera. They must count
    through all of its recordings: those of MSMT17 start anew in each clip, so gaps mean little.

    Images of unknown cameras are one camera. Clusters are numbered through, by camera; a camera in
    which the clusterer finds nothing has outliers only.

    Args:
        clusterer: Makes the clusters of each camera. It is used for one camera after the other, so
            it must not keep what it saw before, as `eps: rho` does.
        max_gap: Frames; null: time is ignored.
        min_images: Of a piece.

    Raises:
        ValueError: The clusterer keeps a state, or compares with a source.
    """

    def __init__(
        self,
        clusterer: Clusterer,
        max_gap: Annotated[int, Range(0, 10**18)] | None = None,
        min_images: Annotated[int, Range(1, 1_000_000)] = 1,
    ) -> None:
        if getattr(clusterer, "keeps_state", hasattr(clusterer, "state_dict")):
            raise ValueError(
                f"clusterer: {type(clusterer).__name__} keeps a state from call to call, which "
                "would mix cameras; take another, such as JaccardDBSCAN"
            )
        self._clusterer = clusterer
        self._max_gap = max_gap
        self._min_images = min_images

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: No camera has a cluster, or images have no frame although they are
                needed.
            ValueError: The clusterer refuses the features of a camera.
        """
        frames, camids = features.frames.cpu(), features.camids.cpu()
        unknown = int((frames < 0).sum())
        if self._max_gap is not None and unknown:
            raise ClusteringError(
                f"max_gap needs the frame number of each image, but {unknown:,} of {len(frames):,} "
                "have none; set max_gap to null, or give frames (CSV has a column `frame`)"
            )
        cluster = torch.full_like(camids, OUTLIER)
        total, done = 0, 0
        empty: list[int] = []
        for camera in torch.unique(camids).tolist():
            rows = (camids == camera).nonzero()[:, 0]
            share = done / len(camids), (done + len(rows)) / len(camids)
            done += len(rows)
            try:
                found = self._clusterer(
                    features[rows.to(features.test.device)],
                    progress=part_of_progress(progress, len(camids), *share),
                ).cluster
            except ClusteringError:
                empty.append(camera)
                continue
            if self._max_gap is not None:
                found = cut_at_gaps(found, frames[rows], self._max_gap, self._min_images)
            clustered = found != OUTLIER
            cluster[rows[clustered]] = found[clustered] + total
            total = int(cluster.max()) + 1
        if empty:
            logger.warning(
                "%d of %d cameras have no cluster (%s): their images are outliers",
                len(empty), len(torch.unique(camids)), ", ".join(map(str, empty)),
            )  # fmt: skip
        if not total:
            raise ClusteringError(
                f"no camera of {len(camids):,} images has a cluster; other options of "
                f"{type(self._clusterer).__name__} or a larger max_gap may help"
            )
        return PseudoLabels.from_clusters(cluster, camids)


@CLUSTERER.register()
class CrossCameraMerger:
    """Merges the clusters of one camera with their likes in other cameras.

    The affinity of two clusters is the mean cosine similarity of their images. For each cluster and
    each other camera, the cluster of that camera with the largest affinity is its counterpart. Two
    clusters that are each other's counterpart merge, if their affinity is at least `threshold`; so
    do all that hang together by such pairs, also those of one camera.

    Affinities exist in blocks of 1024 rows only: with 20,000 clusters inside cameras, 80 MB. Mean
    features take as much memory as L features.

    Args:
        clusterer: Makes clusters inside cameras, such as `CameraClusterer`. Clusters of images of
            several cameras are split by camera first.
        threshold: Least affinity, a cosine similarity.
    """

    def __init__(
        self, clusterer: Clusterer, threshold: Annotated[float, Range(-1, 1)] = 0.5
    ) -> None:
        self._clusterer = clusterer
        self._threshold = threshold
        self._counts: dict[str, float] = {}

    @property
    def uses_source(self) -> bool:
        """Whether the clusterer compares with a source."""
        return bool(getattr(self._clusterer, "uses_source", False))

    def take_source(self, features: FeatureSet) -> None:
        """Passes the source's features on."""
        self._clusterer.take_source(features)  # type: ignore[attr-defined]

    @property
    def choices(self) -> Mapping[str, float]:
        """How many clusters inside cameras were merged last; empty before."""
        return self._counts

    def state_dict(self) -> dict[str, Any]:
        """The clusterer's state, if it has one."""
        give = getattr(self._clusterer, "state_dict", None)
        return {} if give is None else dict(give())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the clusterer's state."""
        take = getattr(self._clusterer, "load_state_dict", None)
        if take is not None and state:
            take(state)

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU, split by camera into proxies.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: The clusterer refuses these features.
        """
        camids = features.camids.cpu()
        local = PseudoLabels.from_clusters(
            self._clusterer(features, progress=progress).cluster, camids
        )
        clustered = (local.proxy != OUTLIER).nonzero()[:, 0]
        proxy = local.proxy[clustered]
        device = features.test.device
        rows = features.test[clustered.to(device)].detach().float().cpu()  # sums in a fixed order
        means = torch.zeros(local.num_proxies, rows.shape[1]).index_add_(0, proxy, rows)
        means = (means / torch.bincount(proxy, minlength=len(means))[:, None]).to(device)

        def affinities(which: Labels) -> npt.NDArray[np.float32]:
            block = means[torch.from_numpy(which).to(device)] @ means.T
            found: npt.NDArray[np.float32] = block.cpu().numpy()
            return found

        merged = merge_across_cameras(affinities, local.proxy_to_camera.numpy(), self._threshold)
        cluster = local.proxy.clone()
        cluster[clustered] = torch.from_numpy(merged)[proxy]
        self._counts = {"in_cameras": local.num_proxies}
        return PseudoLabels.from_clusters(cluster, camids)


def cut_at_gaps(cluster: Tensor, frames: Tensor, max_gap: int, min_images: int = 1) -> Tensor:
    """Cuts clusters where the next image comes too late.

    Args:
        cluster: (N,) from 0, -1 = outlier; the images are of one camera.
        frames: (N,).
        max_gap: Frames between two images of a piece that follow each other.
        min_images: Smaller pieces become outliers.

    Returns:
        (N,) pieces, numbered from 0 by cluster, then time; -1 = outlier.
    """
    numbers, times = cluster.numpy(), frames.numpy()
    order = np.lexsort((times, numbers))
    order = order[numbers[order] != OUTLIER]
    starts = (np.diff(numbers[order], prepend=-2) != 0) | (
        np.diff(times[order], prepend=0) > max_gap
    )
    piece = np.cumsum(starts) - 1
    sizes = np.bincount(piece, minlength=1)
    large = sizes >= min_images
    dense = np.where(large, np.cumsum(large) - 1, OUTLIER)
    result = np.full(len(numbers), OUTLIER)
    result[order] = dense[piece]
    return torch.from_numpy(result)


def merge_across_cameras(affinities: AffinityRows, cameras: Labels, threshold: float) -> Labels:
    """Merges clusters of different cameras that are each other's most alike, by any affinity.

    Args:
        affinities: Of all L clusters, symmetric, row by row.
        cameras: (L,) camera of each cluster.
        threshold: Least affinity of two clusters that merge directly.

    Returns:
        (L,) merged cluster of each, from 0 without gaps.
    """
    count = len(cameras)
    numbers, place = np.unique(cameras, return_inverse=True)
    best = np.full((count, len(numbers)), -1)  # of each cluster: its counterpart in each camera
    for start in range(0, count, _ROWS):
        rows = np.arange(start, min(start + _ROWS, count))
        block = affinities(rows)
        for number in range(len(numbers)):
            (columns,) = np.nonzero(place == number)
            nearest = block[:, columns].argmax(1)
            alike = block[np.arange(len(rows)), columns[nearest]] >= threshold
            other = alike & (place[rows] != number)
            best[rows[other], number] = columns[nearest[other]]
    one, camera = np.nonzero(best >= 0)
    other = best[one, camera]
    mutual = best[other, place[one]] == one
    one, other = one[mutual], other[mutual]
    links = coo_matrix((np.ones(len(one)), (one, other)), shape=(count, count))
    _, merged = connected_components(links, directed=False)
    found: Labels = merged.astype(np.int64)
    return found
