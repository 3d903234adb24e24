"""IICS's labellers: clusters inside cameras, then clusters across them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from torch import nn

from reid.labelling import Labeller, cluster_present
from reid.projects.iics.clustering import (
    InterCameraClusters,
    IntraCameraClusters,
    Linkage,
    SmallCameras,
)
from reid.projects.iics.loss import ClusterCrossEntropy
from reid.registry import LABELLER, ConfigError, Range
from reid.structures import FeatureSet, ImageRecord, ProgressBar, PseudoLabels

Count = Annotated[int, Range(1, 1_000_000)]
Share = Annotated[float, Range(0, 1)]


@LABELLER.register()
class IntraCamera(Labeller):
    """Clusters of each camera alone: re-ranked cosine distance, average linkage (stage 1 of IICS).

    Xuan & Zhang, *Intra-Inter Camera Similarity for Unsupervised Person Re-Identification* (CVPR
    2021), as in their code.

    Args:
        clusters: Of each camera.
        share: In place of a number of clusters: see `Linkage`; 0.0025 in the published variant.
        small_cameras: See `IntraCameraClusters`.
    """

    def __init__(
        self,
        clusters: Count = 600,
        share: Share | None = None,
        small_cameras: SmallCameras = "published",
    ) -> None:
        self._clusters = clusters
        self._share = share
        self._cluster = IntraCameraClusters(Linkage(clusters, share), small_cameras)

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        """Labels of the N images; those that could not be read are outliers.

        Raises:
            ClusteringError: No image has a feature.
            DataError: The disk has too little room for the distances of all pairs.
            ValueError: Features are missing.
        """
        if features is None:
            raise ValueError("IntraCamera needs the features of the training images")
        return cluster_present(self._cluster, features, progress)

    def count_classes(self, records: Sequence[ImageRecord]) -> int:
        """Classes of all cameras; by a share, at most one for each image."""
        cameras = len({record.camid for record in records})
        return len(records) if self._share is not None else cameras * self._clusters


@LABELLER.register()
class InterCamera(Labeller):
    """Clusters across cameras: distance minus the similarity of class scores (stage 2 of IICS).

    Xuan & Zhang (CVPR 2021), as in their code: of images of different cameras,
    mu_e S_ij is subtracted from 1 - cos, where S compares the scores of the classifiers that the
    stage before has trained for each camera, and mu_e = mix_rate (1 - e / rounds)^power in round e.

    At 30,248 images the distances of all pairs take a temporary file of 3.7 GB; see `pair_matrix`
    and, for the memory of the scores, `fill_distances`.

    Args:
        clusters: How many.
        share: In place of a number of clusters: see `Linkage`; 0.0017 in the published variant.
        mix_rate: mu of the first round; 0 ignores class scores.
        rounds: Of the whole run.
        power: Of the fall of mu.
    """

    needs_raw = True

    def __init__(
        self,
        clusters: Count = 800,
        share: Share | None = None,
        mix_rate: Annotated[float, Range(0, 1)] = 0.02,
        rounds: Count = 40,
        power: Annotated[float, Range(0, 100)] = 0.6,
    ) -> None:
        self._clusters = clusters
        self._share = share
        self._cluster = InterCameraClusters(Linkage(clusters, share))
        self._mix_rate = mix_rate
        self._rounds = rounds
        self._power = power
        self._cluster.mix = mix_rate

    def begin_stage(self, round_number: int, ended: nn.Module | None) -> None:
        """Takes the classifiers of the stage before.

        Raises:
            ConfigError: That stage had none for each camera.
        """
        left = max(0.0, 1 - round_number / self._rounds)
        self._cluster.mix = self._mix_rate * left**self._power
        losses = () if ended is None else ended.losses
        heads = [loss for loss in losses if isinstance(loss, ClusterCrossEntropy)]  # type: ignore[union-attr]
        self._cluster.heads = heads[0] if heads else None
        if self._cluster.mix and not heads:
            raise ConfigError(
                "labeller: InterCamera compares the scores of classifiers of the stage before, "
                "which has none; give it the loss ClusterCrossEntropy, or set MIX_RATE 0"
            )

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        """Labels of the N images; those that could not be read are outliers.

        Raises:
            ClusteringError: No image has a feature.
            ConfigError: The classifiers of the stage before are gone.
            DataError: The disk has too little room for the distances of all pairs.
            ValueError: Features are missing.
        """
        if features is None:
            raise ValueError("InterCamera needs the features of the training images")
        if self._cluster.mix and self._cluster.heads is None:
            raise ConfigError(
                "labeller: InterCamera needs the classifiers of the stage before, which are there "
                "only when its own stage begins; give this stage LABELS: once"
            )
        labels = cluster_present(self._cluster, features, progress)
        self._cluster.heads = None  # frees the classifiers
        return labels

    @property
    def choices(self) -> Mapping[str, float]:
        """mu_e, and the limit if clusters are made by a share."""
        limit = {} if self._share is None else {"limit": self._cluster.limit}
        return {"mix": self._cluster.mix, **limit}

    def count_classes(self, records: Sequence[ImageRecord]) -> int:
        """The number of clusters; by a share, at most one for each image."""
        return len(records) if self._share is not None else self._clusters
