"""The base of clusterers: their interface, checks, warnings and the treatment of outliers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Literal, Protocol

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.neighbors import as_rows, log_memory
from reid.registry import CLUSTERER, PART_OF
from reid.structures import OUTLIER, FeatureSet, ProgressBar, PseudoLabels, finite_rows

logger = logging.getLogger(__name__)

Outliers = Literal["drop", "nearest", "singleton"]


class ClusteringError(ValueError):
    """The features give no usable clusters; says what to change."""


class Clusterer(Protocol):
    """What is registered in CLUSTERER."""

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: The options do not fit these features.
        """


PART_OF[Clusterer] = CLUSTERER


def cluster_present(
    clusterer: Clusterer, features: FeatureSet, progress: ProgressBar | None = None
) -> PseudoLabels:
    """Labels of the N images, on the CPU; those that could not be read are outliers.

    Raises:
        ClusteringError: There is no cluster, all features are 0, a feature is not finite, or the
            clusterer refuses these features.
    """
    finite = finite_rows(features.test)
    if not bool(finite.all()):
        raise ClusteringError(
            f"the features of {int((~finite).sum()):,} of {len(features):,} images are not finite: "
            "the model's weights are broken; lower solver.base_lr, or start from other weights"
        )
    rows = features.present.nonzero()[:, 0]
    if not bool(features.test.any()):
        raise ClusteringError(
            f"the features of all {len(features):,} images are 0: the model's weights are broken"
        )
    whole = len(rows) == len(features)
    try:
        labels = clusterer(features if whole else features[rows], progress=progress)
    except ClusteringError:
        raise
    except ValueError as error:
        raise ClusteringError(
            f"{type(clusterer).__name__} cannot cluster {len(rows):,} images: {error}"
        ) from error
    if not isinstance(clusterer, FeatureClusterer):  # these have warned already, more precisely
        other = f"other options of {type(clusterer).__name__} may help"
        _warn_of_illness(labels.cluster, other, other)
    return labels if whole else labels.scatter(rows.cpu(), len(features))


def _warn_of_illness(found: Tensor, how_to_loosen: str, how_to_tighten: str) -> None:
    """Warns if clusters (N,), -1 = outlier, are not worth training on.

    Raises:
        ClusteringError: There is no cluster.
    """
    count = len(found)
    sizes = torch.unique(found[found != OUTLIER], return_counts=True)[1]
    outliers = count - int(sizes.sum())
    looser = (
        f"{how_to_loosen}; if that does not help, the weights that training starts from are too "
        "weak (model.backbone_weights)"
    )
    if not len(sizes):
        raise ClusteringError(f"no cluster among {count:,} images: {looser}")
    largest = int(sizes.max())
    if outliers > 0.9 * count:
        logger.warning("%s of %s images are outliers: %s", f"{outliers:,}", f"{count:,}", looser)
    elif largest > count / 3:
        logger.warning(
            "one cluster holds %s of %s images: %s, or lower solver.base_lr; clusters that "
            "follow cameras instead of persons look the same",
            f"{largest:,}",
            f"{count:,}",
            how_to_tighten,
        )


class FeatureClusterer(ABC):
    """The base of this package's clusterers: warns of bad clusters and treats outliers.

    Args:
        outliers: `drop`: they are not trained on. `nearest`: each joins the cluster whose mean
            feature is most similar. `singleton`: each is a cluster of its own.

    Attributes:
        config_key: Where its options stand in the config, for messages; `build` sets it.

    Raises:
        ValueError: `outliers` is none of these words.
    """

    config_key = "clusterer"

    def __init__(self, outliers: Outliers) -> None:
        if outliers not in ("drop", "nearest", "singleton"):
            raise ValueError(f"outliers: expected drop, nearest or singleton, got {outliers!r}")
        self._outliers = outliers

    @abstractmethod
    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters of unit features (N, D), -1 = outlier."""

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters of a graph of distances (see `graph_clusters`), -1 = outlier.

        Raises:
            ValueError: This clusterer needs features, because it averages them.
        """
        raise ValueError(
            f"{type(self).__name__} needs features, not a graph of {distances.shape[0]} images; "
            "use JaccardDBSCAN, HDBSCAN, Agglomerative or Infomap"
        )

    @abstractmethod
    def memory_mb(self, count: int, dim: int) -> float:
        """About how many MB `find_clusters` takes above the features (count, dim)."""

    @abstractmethod
    def how_to_loosen(self) -> str:
        """What to change for fewer outliers, with the present values."""

    @abstractmethod
    def how_to_tighten(self) -> str:
        """What to change for smaller clusters, with the present values."""

    def graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """Clusters (N,) of a ready graph; -1 = an outlier that remains.

        Without features, `nearest` has no cluster means: an outlier joins the cluster of its
        nearest clustered image in the graph, and stays an outlier if the graph has none.

        Args:
            distances: (N, N) symmetric CSR of distances from 0 to 1, such as `jaccard_distance`
                gives; stored zeros count, and pairs that are not stored have distance 1.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: The graph is not such a matrix, or this clusterer needs features.
        """
        _check_graph(distances)
        found = self._checked(self.find_graph_clusters(distances))
        if self._outliers == "singleton":
            number_outliers(found)
        elif self._outliers == "nearest":
            before = found.clone()
            for i in (before == OUTLIER).nonzero()[:, 0].tolist():
                row = slice(distances.indptr[i], distances.indptr[i + 1])
                others = torch.from_numpy(distances.indices[row]).long()
                near = torch.from_numpy(distances.data[row])
                near = near.masked_fill(before[others] == OUTLIER, torch.inf)
                if len(near) and bool(near.min() < torch.inf):
                    found[i] = before[others[near.argmin()]]
        return found

    def _checked(self, found: Tensor) -> Tensor:
        """The clusters; warns if they look bad, and says what to change.

        Raises:
            ClusteringError: There is no cluster.
        """
        _warn_of_illness(found, self.how_to_loosen(), self.how_to_tighten())
        return found

    def clusters(self, features: FeatureSet, progress: ProgressBar | None = None) -> Tensor:
        """Clusters (N,) of the features; -1 = an outlier that remains.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: There is no image, or a feature is not finite.
        """
        feature = features.test.detach().float()
        as_rows(feature)  # checks the features
        log_memory("Clustering", len(feature), self.memory_mb(*feature.shape))
        found = self._checked(self.find_clusters(feature, progress).cpu())
        kept = found != OUTLIER
        if self._outliers == "singleton":
            number_outliers(found)
        elif self._outliers == "nearest" and not bool(kept.all()):
            feature = feature.cpu()
            numbers, dense = torch.unique(found[kept], return_inverse=True)
            means = torch.zeros(len(numbers), feature.shape[1]).index_add_(0, dense, feature[kept])
            means = F.normalize(means, dim=1)
            lost = (~kept).nonzero()[:, 0]
            for start in range(0, len(lost), 4096):
                part = lost[start : start + 4096]
                found[part] = numbers[(feature[part] @ means.T).argmax(1)]
        return found

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: There is no image, or a feature is not finite.
        """
        return PseudoLabels.from_clusters(self.clusters(features, progress))


def _check_graph(distances: scipy.sparse.csr_matrix) -> None:
    """Raises ValueError if `graph_clusters` cannot use the graph."""
    if not scipy.sparse.issparse(distances) or distances.format != "csr":
        raise ValueError(f"distances: expected a CSR matrix, got {type(distances).__name__}")
    rows, columns = distances.shape
    if rows != columns or not rows:
        raise ValueError(f"distances: expected (N, N) with N > 0, got {distances.shape}")
    data = distances.data
    if len(data) and not (np.isfinite(data).all() and data.min() >= 0 and data.max() <= 1):
        raise ValueError("distances: expected numbers from 0 to 1")
    other = distances.T.tocsr()
    own = distances if distances.has_sorted_indices else distances.sorted_indices()
    other.sort_indices()
    if not all(np.array_equal(getattr(own, x), getattr(other, x)) for x in ("indices", "data")):
        raise ValueError("distances: expected a symmetric matrix")


def number_outliers(found: Tensor) -> None:
    """Gives each outlier a new cluster number, in place."""
    lost = found == OUTLIER
    first = int(found.max()) + 1
    found[lost] = torch.arange(first, first + int(lost.sum()))


def at_least_one(**numbers: int) -> None:
    """Checks that each named option is 1 or more.

    Raises:
        ValueError: An option is below 1.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
