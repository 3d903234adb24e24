"""Clusters of each bank of features by itself: several label sets of the same images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reid.labelling.base import Clusterer, ClusteringError
from reid.registry import CLUSTERER
from reid.structures import OUTLIER, FeatureSet, ProgressBar, PseudoLabels, part_of_progress

logger = logging.getLogger(__name__)

WHOLE = "whole"


@CLUSTERER.register()
class BankClusterer:
    """Clusters the images by the whole feature, and by each part's; each bank by itself.

    Fu et al., *Self-similarity Grouping* (ICCV 2019): the clusters of the whole feature are the
    labels, those of the parts are columns of `PseudoLabels.side` by name. An image that is an
    outlier in one bank is one in all. Each bank has a clusterer of its own, with its own state,
    such as an eps.

    Args:
        clusterer: Makes the clusters of each bank; it sees that bank alone.
        names: Of the parts, in the order of the model's banks; empty: part1, part2, ...

    Raises:
        ValueError: A name is empty, comes twice, or is `whole`.
    """

    def __init__(self, clusterer: Clusterer, names: tuple[str, ...] = ()) -> None:
        if len({*names, "", WHOLE}) != len(names) + 2:
            raise ValueError(
                f"names: expected different words other than {WHOLE!r}, got {list(names)}"
            )
        self._names = names
        self._clusterer = clusterer
        self._banks: list[Clusterer] = []
        self._counts: dict[str, float] = {}

    @property
    def uses_source(self) -> bool:
        """Whether the clusterer needs the features of the labelled source."""
        return bool(getattr(self._clusterer, "uses_source", False))

    def take_source(self, features: FeatureSet) -> None:
        """Gives each bank's features of the source to the bank's clusterer."""
        for number, clusterer in enumerate(self._of_banks(features.unit.shape[1])):
            clusterer.take_source(_bank(features, number))  # type: ignore[attr-defined]

    @property
    def choices(self) -> Mapping[str, float]:
        """The choices of each bank's clusterer, clusters of the parts, and images left out.

        Of the last labels; empty before.
        """
        return self._counts

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: A bank gives no cluster, or every image is an outlier in some bank.
            ValueError: The number of names is not that of the parts, or the clusterer refuses these
                features.
        """
        count = features.unit.shape[1]
        names = (WHOLE, *self._part_names(count - 1))
        found: list[Tensor] = []
        counts: dict[str, float] = {}
        for number, (name, clusterer) in enumerate(zip(names, self._of_banks(count), strict=True)):
            part = part_of_progress(progress, len(features), number / count, (number + 1) / count)
            try:
                labels = clusterer(_bank(features, number), progress=part)
            except ClusteringError as error:
                raise ClusteringError(f"by the feature {name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"by the feature {name}: {error}") from error
            found.append(labels.cluster)
            chosen: Mapping[str, float] = getattr(clusterer, "choices", {})
            counts |= {f"{name}_{key}": value for key, value in chosen.items()}
        kept = torch.stack([cluster != OUTLIER for cluster in found]).all(0)
        if not bool(kept.any()):
            left = ", ".join(
                f"{name} {int((cluster == OUTLIER).sum()):,}"
                for name, cluster in zip(names, found, strict=True)
            )
            raise ClusteringError(
                f"each of {len(kept):,} images is an outlier by some feature ({left}); only images "
                "that are in a cluster of every feature are trained on"
            )
        whole, *parts = (torch.where(kept, cluster, OUTLIER) for cluster in found)
        side = {
            name: PseudoLabels.from_clusters(cluster).cluster
            for name, cluster in zip(names[1:], parts, strict=True)
        }
        self._counts = counts | self._sizes(side, kept)
        return replace(PseudoLabels.from_clusters(whole), side=side)

    def _sizes(self, side: Mapping[str, Tensor], kept: Tensor) -> dict[str, float]:
        """Clusters of each part; warns if one holds so many images that few negatives are left."""
        counts: dict[str, float] = {}
        for name, cluster in side.items():
            sizes = torch.bincount(cluster[kept])
            counts[f"{name}_clusters"] = len(sizes)
            if int(sizes.max()) > int(kept.sum()) / 2:
                logger.warning(
                    "By the feature %s, one cluster holds %s of %s images: they have few negatives",
                    name,
                    f"{int(sizes.max()):,}",
                    f"{int(kept.sum()):,}",
                )
        return counts

    def state_dict(self) -> dict[str, Any]:
        """The state of each bank's clusterer, if they have any."""
        states = [_state(clusterer) for clusterer in self._banks]
        return {"banks": states} if any(states) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the clusterers' states.

        Raises:
            ValueError: It is no list of states.
        """
        states = state.get("banks", [])
        if not isinstance(states, list) or not all(isinstance(item, Mapping) for item in states):
            raise ValueError(f"banks: expected a list of states, got {type(states).__name__}")
        self._banks = []
        for clusterer, own in zip(self._of_banks(len(states)), states, strict=True):
            if own:
                clusterer.load_state_dict(own)  # type: ignore[attr-defined]

    def _of_banks(self, count: int) -> Sequence[Clusterer]:
        """A clusterer for each bank; they last."""
        while len(self._banks) < count:
            self._banks.append(copy.deepcopy(self._clusterer))
        return self._banks[:count]

    def _part_names(self, parts: int) -> tuple[str, ...]:
        names = self._names or tuple(f"part{number + 1}" for number in range(parts))
        if len(names) != parts:
            raise ValueError(
                f"names: expected a name for each of the model's {parts} parts, got {list(names)}"
            )
        return names


def _bank(features: FeatureSet, number: int) -> FeatureSet:
    """A set whose only bank, and test feature, is one of the banks."""
    bank = features.unit[:, number]
    return replace(features, test=bank, unit=bank[:, None], raw=None)


def _state(clusterer: Clusterer) -> dict[str, Any]:
    give = getattr(clusterer, "state_dict", None)
    return {} if give is None else dict(give())
