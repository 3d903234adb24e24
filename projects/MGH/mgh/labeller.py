"""Clusters whose labels are corrected by a hypergraph of appearance, camera and time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from reid.evaluation.time_histograms import count_times
from reid.labelling import Clusterer, ClusteringError, JaccardDBSCAN, Labeller, cluster_present
from reid.neighbors import Labels, rerank_distances
from reid.projects.mgh.distance import (
    JointDistance,
    Rows,
    camera_weights,
    dbscan_of_rows,
    nearest_lists,
    rows_of_graph,
)
from reid.projects.mgh.hypergraph import Graph, Spreading, correct_labels, incidence
from reid.registry import LABELLER, Range
from reid.structures import OUTLIER, FeatureSet, ImageRecord, ProgressBar, PseudoLabels

logger = logging.getLogger(__name__)

CAMERA_WEIGHT = "camera_weight"
NEAREST, RELEVANT = "nearest", "relevant"
_NUM_BINS, _BIN_WIDTH, _SIGMA = 3000, 100, 50.0
_RERANK_K1, _RERANK_K2, _RERANK_LAMBDA = 20, 6, 0.5
_WORTH_A_WARNING = 10  # images for each of the longest list


@LABELLER.register()
class HypergraphLabels(Labeller):
    """Jaccard-DBSCAN clusters, from an epoch on corrected by MGH's hypergraph, split by camera.

    Wu et al., *Metadata Guided Hypergraph for Unsupervised Person Re-identification* (ACM MM 2021).
    From `from_epoch` on, the distance of two images is made of their likeness and of the time
    between them (`JointDistance`, with histograms fitted to the clusters), re-ranked; a hypergraph
    of nearest neighbours, clusters and clusters inside cameras spreads the labels. Outliers stay
    outliers.

    The labels' `side` tells `MGHLoss` of the distance that they came from, the Jaccard distance
    before `from_epoch`: `camera_weight`, and from then on `nearest` and `relevant`.

    No N x N array exists: rows of the distance are computed about eight times an epoch. At 32,621
    images a block takes at most 0.4 GB.

    Args:
        clusterer: A JaccardDBSCAN, which makes the clusters; also those inside each camera, in the
            epoch `from_epoch`.
        from_epoch: The first epoch, from 0, whose labels are corrected.
        neighbors: Lengths of the neighbour lists that are edges of the hypergraph.
        distance_eps: In the epochs after `from_epoch`, DBSCAN with this eps on the distance itself
            takes the place of the clusters inside cameras.
        list_length: Nearest images of each image that the instance loss compares.
        relevance_threshold: An image is relevant for another if 1 - distance is above this.

    Raises:
        ValueError: A number is out of its range, or the clusterer is of another kind.
    """

    def __init__(
        self,
        clusterer: Clusterer,
        from_epoch: Annotated[int, Range(0, 1_000_000)] = 5,
        neighbors: tuple[int, ...] = (10, 30, 50, 70, 90),
        distance_eps: Annotated[float, Range(0, 2, above=True)] = 0.5,
        list_length: Annotated[int, Range(1, 100_000)] = 1000,
        relevance_threshold: Annotated[float, Range(-1, 1)] = 0.1,
    ) -> None:
        if not isinstance(clusterer, JaccardDBSCAN):
            raise ValueError(
                f"clusterer: expected JaccardDBSCAN, got {type(clusterer).__name__}; the distance "
                "of its clusters is needed too"
            )
        if not neighbors or min(neighbors) < 1:
            raise ValueError(f"neighbors: expected numbers of 1 or more, got {neighbors}")
        self._clusterer = clusterer
        self._from_epoch = from_epoch
        self._neighbors = neighbors
        self._distance_eps = distance_eps
        self._list_length = list_length
        self._relevance_threshold = relevance_threshold
        self._epoch = 0
        self._changed = 0
        self._side: dict[str, Tensor] = {}

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        """Labels of the N images; those that could not be read are outliers.

        Raises:
            ClusteringError: There is no cluster, images have no frame number, or there are too few
                images for the neighbour lists.
            ValueError: Features are missing.
        """
        if features is None:
            raise ValueError("HypergraphLabels needs the features of the training images")
        self._side = {}
        try:
            labels = cluster_present(HypergraphClustering(self._labels), features, progress)
        finally:
            self._epoch += 1
        side, self._side = self._side, {}
        if not bool(features.present.all()):
            rows = features.present.nonzero()[:, 0].cpu()
            side = {name: _spread(column, rows, len(features)) for name, column in side.items()}
            if NEAREST in side:  # numbers among the images that could be read
                side[NEAREST] = rows[side[NEAREST].long()].int()
        return replace(labels, side=side)

    @property
    def choices(self) -> Mapping[str, float]:
        """The clusterer's choices, and how many images the hypergraph gave another label."""
        corrected = self._epoch > self._from_epoch
        return {**self._clusterer.choices, **({"corrected": self._changed} if corrected else {})}

    def state_dict(self) -> dict[str, Any]:
        """The next epoch."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._epoch = int(state.get("epoch", 0))

    def _labels(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of images that could all be read; fills `_side`."""
        camids = features.camids.cpu().numpy()
        correcting = self._epoch >= self._from_epoch
        if correcting:
            self._check(features)
        graph = self._clusterer.distances(features.test.detach().float(), progress=progress)
        cluster = self._clusterer.graph_clusters(graph)
        rows = rows_of_graph(graph)
        if correcting:
            rows = self._joint_rows(features, cluster.numpy(), camids)
            corrected = self._corrected(rows, features, cluster.numpy(), camids)
            self._changed = int((corrected != cluster).sum())
            cluster = corrected
        labels = PseudoLabels.from_clusters(cluster, features.camids.cpu())
        self._side[CAMERA_WEIGHT] = camera_weights(
            rows, labels.proxy.numpy(), camids, labels.proxy_to_camera.numpy()
        )
        if correcting:
            self._side[NEAREST], self._side[RELEVANT] = nearest_lists(
                rows, len(labels), self._list_length, self._relevance_threshold
            )
            self._tell_idle(self._side[RELEVANT])
        return labels

    def _tell_idle(self, relevant: Tensor) -> None:
        """Warns if most lists rank nothing, since all of their images are relevant."""
        idle = int(relevant.all(1).sum())
        if 2 * idle > len(relevant):
            logger.warning(
                "labeller.relevance_threshold: for %s of %s images all of their %s nearest are "
                "relevant (1 - distance above %s), so their instance loss is 0. Raise it if the "
                "loss is to do anything",
                f"{idle:,}", f"{len(relevant):,}", f"{relevant.shape[1]:,}",
                self._relevance_threshold,
            )  # fmt: skip

    def _joint_rows(self, features: FeatureSet, cluster: Labels, camids: Labels) -> Rows:
        frames = features.frames.cpu().numpy()
        model = count_times(
            cluster, camids, frames, num_bins=_NUM_BINS, width=_BIN_WIDTH, same_camera="visits"
        ).smoothed(_SIGMA)
        joint = JointDistance(features.test.detach().float(), camids, frames, model)
        return rerank_distances(
            joint.columns, len(cluster), k1=_RERANK_K1, k2=_RERANK_K2, lambda_value=_RERANK_LAMBDA
        ).take

    def _corrected(
        self, rows: Rows, features: FeatureSet, cluster: Labels, camids: Labels
    ) -> Tensor:
        """Classes (N,) after the correction, by the numbers of the clusters."""
        camera_cluster = (
            self._clusters_in_cameras(features, camids)
            if self._epoch == self._from_epoch
            else dbscan_of_rows(rows, len(cluster), self._distance_eps, self._clusterer.min_samples)
        )
        matrix = incidence(rows, (cluster, camera_cluster), self._neighbors)
        graph = Graph.of(matrix, features.test.device, len(self._neighbors))
        return torch.from_numpy(correct_labels(rows, cluster, graph, Spreading()))

    def _clusters_in_cameras(self, features: FeatureSet, camids: Labels) -> Labels:
        """(N,) clusters inside each camera, numbered through, -1 = outlier."""
        result, first = np.full(len(camids), OUTLIER), 0
        for camera in np.unique(camids):
            own = torch.from_numpy(np.flatnonzero(camids == camera))
            feature = features.test[own.to(features.test.device)].detach().float()
            found = self._clusterer.find_clusters(feature, None).cpu().numpy()
            result[own.numpy()[found != OUTLIER]] = first + found[found != OUTLIER]
            first += int(found.max()) + 1
        return result

    def _check(self, features: FeatureSet) -> None:
        """Checks that the hypergraph can be made of these images."""
        unknown, count = int((features.frames < 0).sum()), len(features)
        if unknown:
            raise ClusteringError(
                f"MGH needs the frame number of each image, but {unknown:,} of {count:,} have none;"
                " Market1501, DukeMTMCreID and MSMT17 read it in the names, CSV in a column `frame`"
            )
        longest = max(self._neighbors)
        if 2 * (longest + 1) > count:
            raise ClusteringError(
                f"labeller.neighbors: lists of {longest} and the image itself are more than half "
                f"of {count:,} images; choose shorter ones, e.g. at most {count // 20 or 1}"
            )
        if longest * _WORTH_A_WARNING > count:
            logger.warning(
                "labeller.neighbors: the longest list, %d, is long for %s images; clusters may "
                "merge. Choose shorter ones, e.g. at most %d",
                longest, f"{count:,}", count // 20 or 1,
            )  # fmt: skip


class HypergraphClustering:
    """The labeller as a clusterer of the images that could be read; messages show its name."""

    def __init__(self, cluster: Clusterer) -> None:
        self._cluster = cluster

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: There is no cluster.
        """
        return self._cluster(features, progress)


def _spread(column: Tensor, rows: Tensor, count: int) -> Tensor:
    """A column of some images as one of all `count`, 0 for the others."""
    result = column.new_zeros((count, *column.shape[1:]))
    result[rows] = column
    return result
