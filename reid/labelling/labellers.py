"""Labellers, which give the labels of each epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from reid.labelling.base import Clusterer, cluster_present
from reid.registry import LABELLER, PART_OF
from reid.structures import FeatureSet, ImageRecord, ProgressBar, PseudoLabels


class Labeller(ABC):
    """The base of parts in LABELLER: makes labels of the training images' features and records.

    Attributes:
        fixed: Whether labels are the same in every epoch. Then they are made once, and features
            are extracted only for a loss that needs them.
        needs_raw: Whether it needs `FeatureSet.raw`.
        needs_source: Whether it needs features of the images of source domains, if there are any.
    """

    fixed: bool = False
    needs_raw: bool = False
    needs_source: bool = True

    @property
    def uses_source(self) -> bool:
        """Whether it needs the features of the source's images to label those of the target."""
        return False

    @abstractmethod
    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Args:
            features: Features of the images; may be None if labels are `fixed`.
            records: The images.
            progress: Called with (images done, N).

        Raises:
            ClusteringError: There is no cluster.
        """

    def begin_stage(self, round_number: int, ended: nn.Module | None) -> None:  # noqa: B027
        """A stage of the run begins that uses this labeller; not where a run resumes within it.

        Args:
            round_number: The round that the stage is in, from 0.
            ended: The criterion of the stage before; None in the first one. What later labels need
                of it belongs into `state_dict`.
        """

    @property
    def choices(self) -> Mapping[str, float]:
        """Options that were chosen automatically for the last labels, by name, for the log."""
        return {}

    def count_classes(self, records: Sequence[ImageRecord]) -> int:
        """The number of classes, if it is known before training, for classifiers; 0: unknown."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """State that the next epoch's labels depend on, for checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (most have none)
        """Restores what `state_dict` returned."""


PART_OF[Labeller] = LABELLER


@LABELLER.register()
class Identities(Labeller):
    """The true identities, split by camera: supervised training. Unlabelled images are outliers."""

    fixed = True

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        """Labels of the N images."""
        return PseudoLabels.from_clusters(
            torch.tensor([record.pid for record in records]),
            torch.tensor([record.camid for record in records]),
        )

    def count_classes(self, records: Sequence[ImageRecord]) -> int:
        """The number of identities."""
        return len({record.pid for record in records if record.pid >= 0})


@LABELLER.register()
class Clusters(Labeller):
    """Clusters of the features, made anew in every epoch.

    Args:
        clusterer: Makes the clusters.
        split_by_camera: Split each cluster by camera into proxies, even if the clusterer did not:
            one proxy for each camera of a cluster, numbered by cluster, then camera.
        source_domains: How many of the joined training sets, from the first on, are sources.

    Raises:
        ValueError: The clusterer compares with a source, but there is none.
    """

    def __init__(
        self, clusterer: Clusterer, split_by_camera: bool = False, source_domains: int = 0
    ) -> None:
        self._clusterer = clusterer
        self._split_by_camera = split_by_camera
        self._source_domains = source_domains
        if self.uses_source and not source_domains:
            raise ValueError(
                "the clusterer compares images with those of a labelled source, but there is none; "
                "set datasets.source. For pictures and reviews, which see the target alone, set "
                "the clusterer's source_weight to 0"
            )

    @property
    def uses_source(self) -> bool:
        """Whether the clusterer compares the target's images with those of the source."""
        return bool(getattr(self._clusterer, "uses_source", False))

    def __call__(
        self,
        features: FeatureSet | None,
        records: Sequence[ImageRecord],
        progress: ProgressBar | None = None,
    ) -> PseudoLabels:
        """Labels of the N images; those that could not be read are outliers.

        If the clusterer compares with a source, the source's images are outliers too.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: Features are missing.
        """
        if features is None:
            raise ValueError("Clusters needs the features of the training images")
        if self.uses_source:
            is_source = features.domains < self._source_domains
            self._clusterer.take_source(features[is_source])  # type: ignore[attr-defined]
            features = replace(features, present=features.present & ~is_source)
        labels = cluster_present(self._clusterer, features, progress)
        if self._split_by_camera:
            split = PseudoLabels.from_clusters(labels.cluster, features.camids.cpu())
            labels = replace(split, side=labels.side)
        return labels

    @property
    def choices(self) -> Mapping[str, float]:
        """The clusterer's choices, such as the eps that `auto` chose."""
        return getattr(self._clusterer, "choices", {})

    def state_dict(self) -> dict[str, Any]:
        """The clusterer's state, if it has one."""
        give = getattr(self._clusterer, "state_dict", None)
        return {} if give is None else dict(give())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the clusterer's state."""
        take = getattr(self._clusterer, "load_state_dict", None)
        if take is not None and state:
            take(state)
