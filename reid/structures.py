"""The types that travel between the parts: disk to loss, disk to metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNLABELLED = -1
UNKNOWN_CAMERA = -1
UNKNOWN_FRAME = -1
OUTLIER = -1
_CHECKED_ROWS = 1024
VIEW = "view"
"""Name of the viewpoint, a number from 0, in `ImageRecord.extra` and `Batch.side`; -1: unknown."""


class DataError(Exception):
    """Images, folders or lists on disk are not what was expected; names the path and the layout."""


_NO_EXTRA: Mapping[str, Any] = {}
_NO_SIDE: Mapping[str, Tensor] = {}
_NO_MAPS: Mapping[str, Sequence[int]] = {}


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a dataset.

    Attributes:
        path: Path of the image file.
        pid: Identity; -1 is an unlabelled image (in a gallery: junk).
        camid: Camera, from 0; -1 is unknown.
        domain: Number of its training set among those that are joined, from 0.
        frame: Time inside its camera, in frames; -1 is unknown.
        source: Name of the dataset it comes from, where several are joined; else empty.
        extra: What else its dataset knows, by name. Numbers and arrays reach the batch as
            `Batch.side`; text is for tables and tools. Comparisons ignore it, and `source` too.
    """

    path: str
    pid: int = UNLABELLED
    camid: int = UNKNOWN_CAMERA
    domain: int = 0
    frame: int = UNKNOWN_FRAME
    source: str = field(default="", compare=False)
    extra: Mapping[str, Any] = field(default_factory=lambda: _NO_EXTRA, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.pid < -1 or self.camid < -1:
            raise DataError(
                f"{self.path}: pid and camid start at 0 (-1 = unknown), "
                f"got pid {self.pid}, camid {self.camid}"
            )


class Batch(NamedTuple):
    """Images as they reach the model; torch's pin_memory keeps the type.

    A batch has no identities: losses look labels up by `index`, so unsupervised code cannot see an
    identity.

    Attributes:
        image: Normalised pixels (B, 3, H, W).
        camid: Cameras (B,), -1 = unknown.
        domain: Number of each image's training set (B,), from 0.
        index: Rows of the images in their dataset (B,).
        side: What datasets and transforms add, by name, (B, ...) each.
        views: Further augmentations of the same images, (B, 3, H, W) each.
        maps: Which of `side` are maps (B, C, h, w) of the places in `image`; for each channel the
            one whose values it has in the mirror image.
    """

    image: Tensor
    camid: Tensor
    domain: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not used on a batch
    side: Mapping[str, Tensor] = _NO_SIDE
    views: tuple[Tensor, ...] = ()
    maps: Mapping[str, Sequence[int]] = _NO_MAPS

    @classmethod
    def of(cls, image: Tensor, camid: Tensor | None = None, index: Tensor | None = None) -> Batch:
        """A batch of images (B, 3, H, W), with defaults for what is not known.

        Args:
            image: Normalised pixels.
            camid: (B,); None: unknown.
            index: (B,); None: 0 to B - 1.
        """
        row = torch.arange(image.shape[0], device=image.device)
        camid = torch.full_like(row, UNKNOWN_CAMERA) if camid is None else camid
        return cls(image, camid, torch.zeros_like(row), row if index is None else index)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with each of its tensors changed."""
        return Batch(
            change(self.image),
            change(self.camid),
            change(self.domain),
            change(self.index),
            {name: change(column) for name, column in self.side.items()},
            tuple(change(view) for view in self.views),
            self.maps,
        )

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def mirrored(self) -> Batch:
        """The batch of the mirror images, left for right, without views."""
        side = {
            name: column.flip(3)[:, [*self.maps[name]]] if name in self.maps else column
            for name, column in self.side.items()
        }
        return self._replace(image=self.image.flip(3), side=side, views=())

    def without_pixels(self) -> Batch:
        """The batch with empty images and views, (B, 0), and no maps: losses need none."""
        return self._replace(
            image=self.image.new_empty((len(self.image), 0)),
            side={name: value for name, value in self.side.items() if name not in self.maps},
            views=tuple(view.new_empty((len(view), 0)) for view in self.views),
            maps=_NO_MAPS,
        )


class FeatureTokens(NamedTuple):
    """What a backbone gives to a head.

    Attributes:
        tokens: (B, 1 + h*w, C): one token for the whole image, then the map in row-major order.
        grid: (h, w) of the map.
        before: The tokens before the last layer, of the same shape; None: a backbone without them.
    """

    tokens: Tensor
    grid: tuple[int, int]
    before: Tensor | None = None


class Embeddings(NamedTuple):
    """What a model gives for a batch: banks of features, the whole image first, then K parts.

    Attributes:
        pre: Before the necks (B, 1 + K, D), not normalised: what metric losses such as the triplet
            loss take.
        post: After the necks (B, 1 + K, D), not normalised: what classifiers take.
        unit: L2-normalised (B, 1 + K, D): what memories hold.
        test: L2-normalised (B, D'): what is compared in tests, clustered and exported. D' may
            differ from D.
        aux: What else a loss may name, such as attention maps; (B, ...) each.
    """

    pre: Tensor
    post: Tensor
    unit: Tensor
    test: Tensor
    aux: Mapping[str, Tensor] = _NO_SIDE

    def map(self, change: Callable[[Tensor], Tensor]) -> Embeddings:
        """The same embeddings with each tensor changed."""
        return Embeddings(
            change(self.pre),
            change(self.post),
            change(self.unit),
            change(self.test),
            {name: change(value) for name, value in self.aux.items()},
        )


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Features of N images in dataset order, with what is known about the images.

    Attributes:
        test: (N, D'), L2-normalised float32: what is compared, clustered and exported.
        unit: (N, 1 + K, D), L2-normalised float32: the banks that memories are filled from.
        pids: (N,) int64, -1 = unlabelled.
        camids: (N,) int64, -1 = unknown.
        domains: (N,) int64, number of each image's training set.
        frames: (N,) int64, time inside the camera, -1 = unknown.
        present: (N,) bool, whether the image was extracted: it could be read and was wanted (in a
            stage on the target, no image of the source is); features of the others are 0.
        raw: Features before the necks, not normalised: (N, D) of the whole image, or
            (N, (1 + K) D) of all banks; None: not extracted.

    Raises:
        ValueError: A shape or a type does not fit.
    """

    test: Tensor
    unit: Tensor
    pids: Tensor
    camids: Tensor
    domains: Tensor
    frames: Tensor
    present: Tensor
    raw: Tensor | None = None

    def __post_init__(self) -> None:
        if self.test.ndim != 2:
            raise ValueError(f"test must be (N, D), got {tuple(self.test.shape)}")
        n = len(self.test)
        if self.unit.ndim != 3 or len(self.unit) != n:
            raise ValueError(f"unit must be ({n}, 1 + K, D), got {tuple(self.unit.shape)}")
        for name in ("pids", "camids", "domains", "frames"):
            _check_ids(name, getattr(self, name), n)
        if self.present.shape != (n,) or self.present.dtype != torch.bool:
            raise ValueError(
                f"present must be bool of shape ({n},), got {self.present.dtype} "
                f"{tuple(self.present.shape)}"
            )
        if self.raw is not None and (self.raw.ndim != 2 or len(self.raw) != n):
            raise ValueError(f"raw must be ({n}, D), got {tuple(self.raw.shape)}")

    @classmethod
    def of(
        cls,
        test: Tensor,
        pids: Tensor | None = None,
        camids: Tensor | None = None,
        *,
        unit: Tensor | None = None,
        domains: Tensor | None = None,
        frames: Tensor | None = None,
        present: Tensor | None = None,
    ) -> FeatureSet:
        """A set of features, with defaults for what is not known of the images.

        Args:
            test: (N, D').
            pids: (N,); None: unlabelled.
            camids: (N,); None: unknown.
            unit: (N, 1 + K, D); None: `test` is the only bank.
            domains: (N,); None: one training set.
            frames: (N,); None: unknown.
            present: (N,); None: all images could be read.

        Raises:
            ValueError: A shape or a type does not fit.
        """
        unknown = torch.full((len(test),), -1, device=test.device)
        return cls(
            test,
            test[:, None] if unit is None else unit,
            unknown if pids is None else pids,
            unknown if camids is None else camids,
            torch.zeros_like(unknown) if domains is None else domains,
            unknown if frames is None else frames,
            torch.ones_like(unknown, dtype=torch.bool) if present is None else present,
        )

    def __len__(self) -> int:
        return len(self.test)

    def __getitem__(self, rows: slice | Tensor) -> FeatureSet:
        """The features of some of the images; of images that follow each other, as views.

        Args:
            rows: A slice, (M,) int64 indices, or (N,) bool.
        """
        rows = rows if isinstance(rows, slice) else _without_gaps(rows)
        columns: list[Any] = [getattr(self, column.name) for column in fields(self)]
        chosen: list[Any] = [None if column is None else column[rows] for column in columns]
        return FeatureSet(*chosen)


@dataclass(frozen=True, slots=True)
class PseudoLabels:
    """Clusters of the training images, and the proxies (parts of clusters) inside them.

    Attributes:
        cluster: (N,) int64, 0..C-1 without gaps, -1 = outlier.
        proxy: (N,) int64, 0..P-1 without gaps, -1 = outlier.
        proxy_to_cluster: (P,) int64.
        proxy_to_camera: (P,) int64, -1 = no camera or cameras unknown.
        side: What else a labeller tells the losses of its method about each image, by name,
            (N, ...) each. Checkpoints hold only columns of one number for each image.

    Raises:
        ValueError: The four do not fit each other, or a tensor of `side` has another length.
    """

    cluster: Tensor
    proxy: Tensor
    proxy_to_cluster: Tensor
    proxy_to_camera: Tensor
    side: Mapping[str, Tensor] = field(default_factory=lambda: _NO_SIDE)

    def __post_init__(self) -> None:
        n, p = len(self.cluster), len(self.proxy_to_cluster)
        _check_ids("cluster", self.cluster, n)
        _check_ids("proxy", self.proxy, n)
        _check_ids("proxy_to_cluster", self.proxy_to_cluster, p)
        _check_ids("proxy_to_camera", self.proxy_to_camera, p)
        clustered = self.proxy != OUTLIER
        if not torch.equal(clustered, self.cluster != OUTLIER):
            raise ValueError("an image is an outlier in `cluster` or in `proxy`, but not in both")
        if not torch.equal(
            torch.unique(self.proxy[clustered]), torch.arange(p, device=self.proxy.device)
        ):
            raise ValueError(f"`proxy` must use each of 0..{p - 1}, as proxy_to_cluster does")
        if not torch.equal(self.proxy_to_cluster[self.proxy[clustered]], self.cluster[clustered]):
            raise ValueError("proxy_to_cluster[proxy] must be the image's cluster")
        clusters = torch.unique(self.proxy_to_cluster)
        if not torch.equal(clusters, torch.arange(len(clusters), device=clusters.device)):
            raise ValueError("`cluster` must use each number from 0 to its largest")
        for name, column in self.side.items():
            if len(column) != n:
                raise ValueError(f"side {name!r} must have {n} rows, got {len(column)}")

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
        clustered = cluster != OUTLIER
        dense = torch.full_like(cluster, OUTLIER)
        dense[clustered] = torch.unique(cluster[clustered], return_inverse=True)[1]
        pairs, inverse = torch.unique(
            torch.stack((dense[clustered], camids[clustered]), 1), dim=0, return_inverse=True
        )
        proxy = torch.full_like(cluster, OUTLIER)
        proxy[clustered] = inverse
        return cls(dense, proxy, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())

    def scatter(self, rows: Tensor, count: int) -> PseudoLabels:
        """These labels spread over `count` images, where the other images are outliers.

        In `side`, whole numbers of the others are -1, and other numbers 0.

        Args:
            rows: (N,) int64, the index of each of these N images among the `count`.
            count: Number of all images.
        """
        cluster = self.cluster.new_full((count,), OUTLIER)
        proxy = cluster.clone()
        cluster[rows], proxy[rows] = self.cluster, self.proxy
        side = {}
        for name, column in self.side.items():
            whole = not (column.is_floating_point() or column.dtype == torch.bool)
            side[name] = column.new_full((count, *column.shape[1:]), OUTLIER if whole else 0)
            side[name][rows] = column
        return PseudoLabels(cluster, proxy, self.proxy_to_cluster, self.proxy_to_camera, side)

    def __getitem__(self, rows: Tensor) -> PseudoLabels:
        """The labels of some of the images, numbered anew without gaps, in the old order.

        Args:
            rows: (M,) int64, the images.
        """
        cluster, proxy = self.cluster[rows], self.proxy[rows]
        proxies = torch.unique(proxy[proxy != OUTLIER])
        clusters = torch.unique(self.proxy_to_cluster[proxies])
        return PseudoLabels(
            torch.where(cluster == OUTLIER, OUTLIER, torch.searchsorted(clusters, cluster)),
            torch.where(proxy == OUTLIER, OUTLIER, torch.searchsorted(proxies, proxy)),
            torch.searchsorted(clusters, self.proxy_to_cluster[proxies]),
            self.proxy_to_camera[proxies],
            {name: column[rows] for name, column in self.side.items()},
        )

    def __len__(self) -> int:
        return len(self.cluster)

    @property
    def num_clusters(self) -> int:
        """C, the number of clusters."""
        return int(self.proxy_to_cluster.max()) + 1 if self.num_proxies else 0

    @property
    def num_proxies(self) -> int:
        """P, the number of proxies."""
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
            {name: column.to(device) for name, column in self.side.items()},
        )


ProgressBar = Callable[[int, int], None]
"""A function that a long job calls with (done, total) as it goes on."""


def part_of_progress(
    progress: ProgressBar | None, total: int, start: float, stop: float
) -> ProgressBar | None:
    """A progress bar for one part of a job.

    Args:
        progress: The bar of the job.
        total: What the job's bar calls its total.
        start: Share of the job that is done before the part, from 0 to 1.
        stop: Share of the job that is done after it.
    """
    if progress is None:
        return None
    show = progress

    def part(done: int, of: int) -> None:
        show(round(total * (start + (stop - start) * done / max(of, 1))), total)

    return part


def finite_rows(values: Tensor) -> Tensor:
    """Whether all numbers of each row (N, ...) are finite: (N,) bool.

    It goes part by part, since torch's `isfinite` takes more memory than its values.
    """
    parts = torch.split(values, _CHECKED_ROWS)
    return torch.cat([torch.isfinite(part).flatten(1).all(1) for part in parts])


def _without_gaps(rows: Tensor) -> slice | Tensor:
    """The same rows as a slice if they follow each other, since a slice copies nothing."""
    rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
    if not len(rows) or int(rows[0]) < 0:
        return rows
    first, stop = int(rows[0]), int(rows[0]) + len(rows)
    follow = torch.equal(rows, torch.arange(first, stop, dtype=rows.dtype, device=rows.device))
    return slice(first, stop) if follow else rows


def _check_ids(name: str, ids: Tensor, length: int) -> None:
    if ids.shape != (length,) or ids.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 of shape ({length},), got {ids.dtype} {tuple(ids.shape)}"
        )
    if length and int(ids.min()) < -1:
        raise ValueError(f"{name} must be -1 or more, got {int(ids.min())}")
