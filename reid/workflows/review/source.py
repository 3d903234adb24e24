"""The data of a review: a run's images, features of its model, and clusters."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reid.assembly.hooks import build_evaluator
from reid.assembly.images import build_image_set
from reid.assembly.labelling import build_labeller, clustering_config
from reid.assembly.trained import describe_course
from reid.config import Config
from reid.engine.logs import progress_bar
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.matches import camera_name, cluster_confidence
from reid.evaluation.ranking import top_matches
from reid.files import replacing
from reid.labelling import ClusteringError
from reid.neighbors import nearest_neighbors
from reid.registry import ConfigError
from reid.structures import OUTLIER, UNKNOWN_CAMERA, FeatureSet, ImageRecord
from reid.workflows.report.reading import read_run
from reid.workflows.review.journal import places_of
from reid.workflows.trained import TrainedModel, load_trained

logger = logging.getLogger(__name__)

CACHE = "features.safetensors"
_NEIGHBORS, _SEARCHED, _ROWS = 10, 40, 1024
_LAYOUT = "2"  # of the cache; a cache with another layout is computed again


@dataclass(frozen=True)
class Source:
    """N images as a trained model sees them.

    Attributes:
        name: Of the run.
        run: Its folder.
        config: Of the run, with the weights in `model.weights`.
        records: The images, in the order of their numbers.
        features: Their test features, on the CPU, without identities: a review must not see these.
        cluster: (N,) int64, -1 = outlier.
        confidence: (N,) of belonging to the cluster; see `cluster_confidence`.
        clusters_from: Where the clusters are from, in words.
        neighbors: (N, k) int64, for each image near ones of other cameras, nearest first; see
            `cross_camera_neighbors`.
        likeness: (N, k) float32, cosine of each image and its neighbours; 0 where there is none.
        evaluator: Of the run's tests.
        fingerprint: Of weights, images and settings that features depend on.
        sites: Folders or data sets whose cameras the model has learned; none: it knows of no
            cameras.
    """

    name: str
    run: Path
    config: Config
    records: Sequence[ImageRecord]
    features: FeatureSet
    cluster: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]
    clusters_from: str
    neighbors: npt.NDArray[np.int64]
    likeness: npt.NDArray[np.float32]
    evaluator: Evaluator
    fingerprint: str
    sites: frozenset[str] = frozenset()

    @property
    def paths(self) -> list[str]:
        """Of the images."""
        return [record.path for record in self.records]


def open_source(run: Path, folder: Path, overrides: Sequence[str] = ()) -> Source:
    """The training images of a run with the features of its best weights.

    Features, clusters and neighbours are stored in `features.safetensors`, and computed again when
    the weights, the images or the settings behind them change.

    Args:
        run: Folder of a run: config.yaml, weights, and clusters.csv where the run has written it.
        folder: Of the review, where they are kept.
        overrides: KEY VALUE pairs that win over the run's config.

    Raises:
        ConfigError: The folder holds no run, or a setting is wrong.
        DataError: The images are not what was expected.
        WeightsError: The weights do not fit.
        OutputError: The features cannot be kept.
    """
    if not run.is_dir():
        raise ConfigError(f"{run}: is no folder; expected the output folder of a run")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: has no config.yaml; expected the output folder of a run")
    trained = load_trained(run, overrides=overrides)
    images = trained.train_images
    if images is None:
        raise ConfigError(f"{run / 'config.yaml'}: DATASETS.TRAIN names no images to review")
    records = images.clustered()
    fingerprint = _fingerprint(trained, records)
    path = folder / CACHE
    found = _read_cache(path, fingerprint, len(records))
    if found is None:
        found = _compute(trained, run, records)
        with replacing(path) as temporary:
            meta = {"fingerprint": fingerprint, "clusters_from": found.clusters_from}
            save_file(found.tensors, temporary, meta)
    return Source(
        trained.name,
        run,
        trained.config,
        records,
        _feature_set(records, found.tensors["test"], found.tensors["present"]),
        found.tensors["cluster"].numpy(),
        found.tensors["confidence"].numpy(),
        found.clusters_from,
        found.tensors["neighbors"].numpy(),
        found.tensors["likeness"].numpy(),
        build_evaluator(trained.config),
        fingerprint,
        frozenset(camera.site for camera in trained.cameras or ()),
    )


def cross_camera_neighbors(
    features: FeatureSet, paths: Sequence[str], k: int
) -> npt.NDArray[np.int64]:
    """(N, k) near images of other cameras, nearest first; -1 where fewer are known.

    They come from the `_SEARCHED` exact nearest images of any camera. If all of these are of the
    image's own camera, a search among all images finds the nearest one of another camera.
    Unreadable images have no neighbours and are nobody's neighbour; images of unknown cameras get
    the nearest of all images.

    Args:
        features: Of N images.
        paths: Of them: an image is not its own neighbour.
        k: Length of the lists.
    """
    readable = features.present.nonzero()[:, 0]
    chosen = features[readable]
    places, camids = readable.numpy(), chosen.camids.numpy()
    neighbors = np.full((len(features), k), -1, np.int64)
    if not len(places):
        return neighbors
    with progress_bar("Looking for near images", "img") as progress:
        near = nearest_neighbors(chosen.test, min(_SEARCHED, len(places)), progress=progress)
    itself = near == np.arange(len(places))[:, None]
    same_camera = (camids[near] == camids[:, None]) & (camids[:, None] != UNKNOWN_CAMERA)
    usable = ~(itself | same_camera)
    order = np.argsort(~usable, axis=1, kind="stable")[:, :k]  # the usable first, nearest first
    picked = np.take_along_axis(near, order, 1).astype(np.int64)
    picked[~np.take_along_axis(usable, order, 1)] = -1
    neighbors[places, : picked.shape[1]] = np.where(picked >= 0, places[picked], -1)
    alone = np.flatnonzero(~usable.any(1))
    if len(alone):
        # With one identity for all, the evaluation protocol skips images of the same camera.
        chosen = replace(chosen, pids=torch.zeros_like(chosen.pids))
        names = [paths[place] for place in places.tolist()]
        query_names = [names[row] for row in alone.tolist()]
        asked = chosen[torch.from_numpy(alone)]
        found = top_matches(asked, chosen, k=1, query_paths=query_names, gallery_paths=names)[:, 0]
        neighbors[places[alone], 0] = np.where(found >= 0, places[found], -1)
    return neighbors


def neighbor_likeness(
    features: Tensor, neighbors: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """(N, k) cosine of each image and its neighbours; 0 where there is none.

    Args:
        features: (N, D) of unit length.
        neighbors: (N, k) numbers; -1 = none.
    """
    likeness = torch.zeros(neighbors.shape)
    near = torch.from_numpy(neighbors)
    for start in range(0, len(near), _ROWS):
        rows = near[start : start + _ROWS]
        one, others = features[start : start + _ROWS], features[rows.clamp(min=0)]
        likeness[start : start + _ROWS] = torch.einsum("nd,nkd->nk", one, others)
    found: npt.NDArray[np.float32] = likeness.masked_fill(near < 0, 0.0).numpy()
    return found


@dataclass(frozen=True)
class _Computed:
    """What is kept in a file.

    Attributes:
        tensors: `test` (N, D), `present`, `cluster`, `confidence` (N,), `neighbors` and `likeness`
            (N, k).
        clusters_from: See `Source`.
    """

    tensors: dict[str, Tensor]
    clusters_from: str


def _compute(trained: TrainedModel, run: Path, records: Sequence[ImageRecord]) -> _Computed:
    config = trained.config
    images = replace(build_image_set(config, "training images", records), flip=config.test.flip)
    with progress_bar("Extracting", "img") as progress:
        features = images.features(trained.model, trained.device, progress)
    test, present = features.test.cpu(), features.present.cpu()
    cluster, clusters_from = _read_clusters(run, records)
    if cluster is None:
        cluster, clusters_from = _find_clusters(config, records, features)
    cluster[~present] = OUTLIER
    known = _feature_set(records, test, present)
    neighbors = cross_camera_neighbors(known, [record.path for record in records], _NEIGHBORS)
    tensors = {
        "test": test.contiguous(),
        "present": present,
        "cluster": cluster,
        "confidence": cluster_confidence(test, cluster),
        "neighbors": torch.from_numpy(neighbors),
        "likeness": torch.from_numpy(neighbor_likeness(test, neighbors)),
    }
    return _Computed(tensors, clusters_from)


def _read_clusters(run: Path, records: Sequence[ImageRecord]) -> tuple[Tensor | None, str]:
    """The clusters that the run has written, if they are of these images."""
    listed = read_run(run).clusters
    places = places_of([record.path for record in records])
    cluster = torch.full((len(records),), OUTLIER)
    known = set()
    for image in listed:
        place = places.get(os.path.abspath(image.path))  # noqa: PTH100 (many, and no Path)
        if place is not None:
            cluster[place] = max(image.cluster, OUTLIER)
            known.add(place)
    if len(known) == len(places):
        return cluster, "clusters.csv, which the run has written"
    if listed:
        logger.warning(
            "%s lists %s of the %s training images: computing clusters again",
            run / "clusters.csv",
            f"{len(known):,}",
            f"{len(records):,}",
        )
    return None, ""


def _find_clusters(
    config: Config, records: Sequence[ImageRecord], features: FeatureSet
) -> tuple[Tensor, str]:
    nothing = torch.full((len(records),), OUTLIER)
    labeller = build_labeller(clustering_config(config), records, "the run")
    if labeller.fixed:
        return nothing, "nowhere: the run was trained with labels and has no clusterer"
    try:
        with progress_bar("Clustering", "img") as progress:
            labels = labeller(features, records, progress)
    except ClusteringError as error:
        logger.warning("There are no clusters to review: %s", error)
        return nothing, f"nowhere: {error}"
    return labels.cluster.cpu().clone(), "the model and the run's clusterer, made for this review"


def _feature_set(records: Sequence[ImageRecord], test: Tensor, present: Tensor) -> FeatureSet:
    camids = torch.tensor([record.camid for record in records])
    return FeatureSet.of(test, camids=camids, present=present)


def _fingerprint(trained: TrainedModel, records: Sequence[ImageRecord]) -> str:
    config = trained.config
    digest = hashlib.sha256()
    with Path(config.model.weights).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    settings = {
        "layout": _LAYOUT,
        "images": describe_course(records)["images"],
        "cameras": [camera_name(record) for record in records],
        "input": asdict(config.input),
        "model": [config.model.backbone, config.model.head],
        "labels": [config.labeller, config.clusterer],
        "test": [config.test.flip, config.test.precision],
        "clusters": _digest_of(trained.run and trained.run / "clusters.csv"),
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _digest_of(path: Path | None) -> str:
    if path is None or not path.is_file():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_cache(path: Path, fingerprint: str, count: int) -> _Computed | None:
    """What was kept, if it is of the same weights, images and settings."""
    if not path.is_file():
        return None
    names = ("test", "present", "cluster", "confidence", "neighbors", "likeness")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                logger.info(
                    "%s comes from other weights, images or settings: computing it again", path
                )
                return None
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read (%s): computing it again", path, error)
        return None
    if any(len(tensor) != count for tensor in tensors.values()):
        return None
    return _Computed(tensors, metadata.get("clusters_from", ""))
