"""The types that travel between the parts: disk to loss, disk to metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

UNLABELLED = -1
UNKNOWN_CAMERA = -1
OUTLIER = -1


class DataError(Exception):
    """Images, folders or lists on disk are not what was expected; names the path and the layout."""


_NOTHING_MORE: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a dataset.

    Attributes:
        path: Path of the image file.
        pid: Identity; -1 is an unlabelled image (in a gallery: junk).
        camid: Camera, from 0; -1 is unknown.
        source: Name of the dataset it comes from, where several are joined; else empty.
        extra: What else its dataset knows, by name, such as further columns of a list; for tables
            and tools, never for training. Plays no part in comparisons, nor does `source`.
    """

    path: str
    pid: int = UNLABELLED
    camid: int = UNKNOWN_CAMERA
    source: str = field(default="", compare=False)
    extra: Mapping[str, str] = field(
        default_factory=lambda: _NOTHING_MORE, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.pid < -1 or self.camid < -1:
            raise DataError(
                f"{self.path}: pid and camid start at 0 (-1 = unknown), "
                f"got pid {self.pid}, camid {self.camid}"
            )


class Batch(NamedTuple):
    """Images as they reach the model; torch's own collate and pin_memory keep the type.

    Attributes:
        image: Normalised pixels (B, 3, H, W).
        pid: Identities (B,), -1 = unlabelled.
        camid: Cameras (B,), -1 = unknown.
        index: Rows of the images in their dataset (B,).
    """

    image: Tensor
    pid: Tensor
    camid: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not used on a batch

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        return Batch(*(field.to(device, non_blocking=non_blocking) for field in self))


class FeatureTokens(NamedTuple):
    """What a backbone gives to a head.

    Attributes:
        tokens: (B, 1 + h*w, C): one token for the whole image, then the map in row-major order.
        grid: (h, w) of the map.
    """

    tokens: Tensor
    grid: tuple[int, int]


class Embeddings(NamedTuple):
    """What a model gives for a batch.

    Attributes:
        global_feat: L2-normalised features of the whole image (B, D), which are compared in tests
            and in clustering.
        part_feats: L2-normalised features of K parts (B, K, D); K may be 0.
        pre_neck: The global feature before the neck's BatchNorm (B, D), not normalised: what
            metric losses such as the triplet loss take.
        post_neck: The global feature after BatchNorm (B, D), not normalised: what classifiers
            take.
    """

    global_feat: Tensor
    part_feats: Tensor
    pre_neck: Tensor
    post_neck: Tensor


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Embeddings of N images in dataset order, with what is known about the images.

    Attributes:
        global_feat: (N, D), L2-normalised float32; 0 for an image that could not be read.
        part_feats: (N, K, D), L2-normalised float32; K may be 0.
        pids: (N,) int64, -1 = unlabelled.
        camids: (N,) int64, -1 = unknown.
    """

    global_feat: Tensor
    part_feats: Tensor
    pids: Tensor
    camids: Tensor

    def __post_init__(self) -> None:
        if self.global_feat.ndim != 2:
            raise ValueError(f"global_feat must be (N, D), got {tuple(self.global_feat.shape)}")
        n = len(self.global_feat)
        if self.part_feats.ndim != 3 or len(self.part_feats) != n:
            raise ValueError(f"part_feats must be ({n}, K, D), got {tuple(self.part_feats.shape)}")
        for name in ("pids", "camids"):
            _check_ids(name, getattr(self, name), n)

    def __len__(self) -> int:
        return len(self.global_feat)

    def __getitem__(self, rows: slice | Tensor) -> FeatureSet:
        """The same for some of the images."""
        return FeatureSet(
            self.global_feat[rows], self.part_feats[rows], self.pids[rows], self.camids[rows]
        )

    @property
    def readable(self) -> Tensor:
        """(N,) bool: the images that could be read, which are those whose feature is not 0."""
        return self.global_feat.any(1)

    @property
    def banks(self) -> Tensor:
        """Global and part features as one tensor (1 + K, N, D), the global ones first."""
        return torch.cat((self.global_feat[None], self.part_feats.transpose(0, 1)))


@dataclass(frozen=True, slots=True)
class PseudoLabels:
    """Clusters of the training images, and the proxies (parts of clusters) inside them.

    Attributes:
        cluster: (N,) int64, 0..C-1 without gaps, -1 = outlier.
        proxy: (N,) int64, 0..P-1 without gaps, -1 = outlier.
        proxy_to_cluster: (P,) int64.
        proxy_to_camera: (P,) int64, -1 = no camera or cameras unknown.

    Raises:
        ValueError: The four do not fit each other.
    """

    cluster: Tensor
    proxy: Tensor
    proxy_to_cluster: Tensor
    proxy_to_camera: Tensor

    def __post_init__(self) -> None:
        n, p = len(self.cluster), len(self.proxy_to_cluster)
        _check_ids("cluster", self.cluster, n)
        _check_ids("proxy", self.proxy, n)
        _check_ids("proxy_to_cluster", self.proxy_to_cluster, p)
        _check_ids("proxy_to_camera", self.proxy_to_camera, p)
        kept = self.proxy != OUTLIER
        if not torch.equal(kept, self.cluster != OUTLIER):
            raise ValueError("an image is an outlier in `cluster` or in `proxy`, but not in both")
        if not torch.equal(
            torch.unique(self.proxy[kept]), torch.arange(p, device=self.proxy.device)
        ):
            raise ValueError(f"`proxy` must use each of 0..{p - 1}, as proxy_to_cluster does")
        if not torch.equal(self.proxy_to_cluster[self.proxy[kept]], self.cluster[kept]):
            raise ValueError("proxy_to_cluster[proxy] must be the image's cluster")

    @classmethod
    def from_clusters(cls, cluster: Tensor, camids: Tensor | None = None) -> PseudoLabels:
        """Labels from a cluster for each image, with the clusters split by camera if known.

        Proxies are numbered by cluster, then camera, both ascending; only the cameras present
        in a cluster give a proxy.

        Args:
            cluster: (N,) int64; any ids from 0, gaps allowed; -1 = outlier.
            camids: (N,) int64, -1 = unknown (a group of its own). None: a cluster is one proxy.

        Raises:
            ValueError: A shape or a dtype does not fit.
        """
        _check_ids("cluster", cluster, len(cluster))
        if camids is None:
            camids = torch.full_like(cluster, UNKNOWN_CAMERA)
        _check_ids("camids", camids, len(cluster))
        kept = cluster != OUTLIER
        dense = torch.full_like(cluster, OUTLIER)
        dense[kept] = torch.unique(cluster[kept], return_inverse=True)[1]
        pairs, inverse = torch.unique(
            torch.stack((dense[kept], camids[kept]), 1), dim=0, return_inverse=True
        )
        proxy = torch.full_like(cluster, OUTLIER)
        proxy[kept] = inverse
        return cls(dense, proxy, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())

    def placed(self, rows: Tensor, count: int) -> PseudoLabels:
        """The same labels as those of some of `count` images; the others are outliers.

        Args:
            rows: (N,) int64, where each image of these labels stands among the `count`.
            count: All images.
        """
        cluster = self.cluster.new_full((count,), OUTLIER)
        proxy = cluster.clone()
        cluster[rows], proxy[rows] = self.cluster, self.proxy
        return PseudoLabels(cluster, proxy, self.proxy_to_cluster, self.proxy_to_camera)

    def __len__(self) -> int:
        return len(self.cluster)

    @property
    def num_clusters(self) -> int:
        """C."""
        return int(self.proxy_to_cluster.max()) + 1 if self.num_proxies else 0

    @property
    def num_proxies(self) -> int:
        """P."""
        return len(self.proxy_to_cluster)

    @property
    def num_outliers(self) -> int:
        """Images in no cluster."""
        return int((self.cluster == OUTLIER).sum())

    def to(self, device: torch.device) -> PseudoLabels:
        """The same labels on `device`."""
        return PseudoLabels(
            self.cluster.to(device),
            self.proxy.to(device),
            self.proxy_to_cluster.to(device),
            self.proxy_to_camera.to(device),
        )


ProgressBar = Callable[[int, int], None]
"""Called with (done, total) as a long job goes on."""


def part_of_progress(
    progress: ProgressBar | None, total: int, start: float, stop: float
) -> ProgressBar | None:
    """The bar of a part of a job.

    Args:
        progress: The bar of the job.
        total: Of the job.
        start: Share of the job that is done before the part, from 0 to 1.
        stop: Share of the job that is done after it.
    """
    if progress is None:
        return None
    show = progress

    def part(done: int, of: int) -> None:
        show(round(total * (start + (stop - start) * done / max(of, 1))), total)

    return part


def _check_ids(name: str, ids: Tensor, length: int) -> None:
    if ids.shape != (length,) or ids.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 of shape ({length},), got {ids.dtype} {tuple(ids.shape)}"
        )
    if length and int(ids.min()) < -1:
        raise ValueError(f"{name} must be -1 or more, got {int(ids.min())}")
