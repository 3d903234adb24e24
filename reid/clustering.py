"""Clusterers: features become pseudo-labels."""

from __future__ import annotations

import heapq
import importlib
import itertools
import logging
from abc import ABC, abstractmethod
from typing import Literal, Protocol

import faiss
import numpy as np
import scipy.sparse
import sklearn.cluster
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from torch import Tensor
from torch.nn import functional as F

from reid.neighbors import (
    Labels,
    Search,
    dbscan,
    jaccard_distance,
    jaccard_memory_mb,
    nearest_neighbors,
)
from reid.registry import CLUSTERER, ConfigError
from reid.structures import OUTLIER, UNLABELLED, FeatureSet, ProgressBar, PseudoLabels

Outliers = Literal["drop", "nearest", "singleton"]
logger = logging.getLogger(__name__)

_SILHOUETTE_SAMPLE = 2000
_LARGE = 50_000
# All distances that a clusterer needs, those a rounding above its largest among them.
_SLACK = 1e-5


class ClusteringError(ValueError):
    """The features give no usable clusters; says what to change."""


class Clusterer(Protocol):
    """What is registered in CLUSTERER."""

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: There is no cluster.
        """


class FeatureClusterer(ABC):
    """What the clusterers here share: what becomes of outliers, and the error if all are.

    Args:
        outliers: `drop`: they are not trained on. `nearest`: each joins the cluster whose mean
            feature is most similar. `singleton`: each is a cluster of its own.

    Raises:
        ValueError: The word is none of these.
    """

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
            ValueError: This clusterer needs features, as one that averages them does.
        """
        raise ValueError(
            f"{type(self).__name__} needs features, not a graph of {distances.shape[0]} images; "
            "use JaccardDBSCAN, HDBSCAN, Agglomerative or Infomap"
        )

    @abstractmethod
    def advice(self) -> str:
        """Why there may be no cluster, and what to change."""

    def graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters of a ready graph, -1 = outlier, after outliers were dealt with.

        `nearest` has no mean features here: an outlier joins the cluster of the nearest clustered
        image that the graph stores for it, and stays an outlier where there is none.

        Args:
            distances: (N, N) symmetric CSR of distances from 0 to 1, such as `jaccard_distance`
                gives; zeros count as stored, what is not stored is 1.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: The graph is not such a matrix, or this clusterer needs features.
        """
        _check_graph(distances)
        found = self._with_clusters(self.find_graph_clusters(distances))
        if self._outliers == "singleton":
            _number_outliers(found)
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

    def _with_clusters(self, found: Tensor) -> Tensor:
        if not bool((found != OUTLIER).any()):
            raise ClusteringError(f"no cluster among {len(found)} images: {self.advice()}")
        return found

    def clusters(self, features: FeatureSet, progress: ProgressBar | None = None) -> Tensor:
        """(N,) clusters, -1 = outlier, after outliers were dealt with.

        Raises:
            ClusteringError: There is no cluster.
        """
        feature = features.global_feat.detach().float()
        found = self._with_clusters(self.find_clusters(feature, progress).cpu())
        kept = found != OUTLIER
        if self._outliers == "singleton":
            _number_outliers(found)
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
        """
        return PseudoLabels.from_clusters(self.clusters(features, progress))


@CLUSTERER.register()
class JaccardDBSCAN(FeatureClusterer):
    """DBSCAN on k-reciprocal Jaccard distances of the global features.

    The pseudo-labels of Ge et al., *Self-paced Contrastive Learning* (NeurIPS 2020), and of most
    work since. Images at a distance of `eps` count as neighbours with a tolerance of 1e-6, so
    that ties do not depend on rounding (`reid.neighbors.TIE_TOLERANCE`). Clusters are not split by
    camera: each is one proxy.

    Args:
        k1: Length of the neighbour lists, the image itself included.
        k2: Rows averaged in the local query expansion.
        eps: Largest Jaccard distance of neighbours, from 0 to below 1.
        min_samples: Neighbours that make a core point, the image itself included.
        outliers: `drop`, `nearest` or `singleton`; see `FeatureClusterer`.
        search: `exact`, or `ivf` or `hnsw` for more images than the exact search can take.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        k1: int = 20,
        k2: int = 6,
        eps: float = 0.5,
        min_samples: int = 4,
        outliers: Outliers = "drop",
        search: Search = "exact",
    ) -> None:
        super().__init__(outliers)
        _at_least_one(k1=k1, k2=k2, min_samples=min_samples)
        if not 0 < eps < 1:
            raise ValueError(f"eps: expected 0 < eps < 1, got {eps}")
        self._k1 = k1
        self._k2 = k2
        self._eps = eps
        self._min_samples = min_samples
        self._search: Search = search

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        if len(features) >= _LARGE:
            logger.info(
                "Clustering %s images, about %s MB above their features",
                f"{len(features):,}",
                f"{jaccard_memory_mb(len(features), features.shape[1], self._k1, self._k2):,.0f}",
            )
        distances = jaccard_distance(
            features,
            self._k1,
            self._k2,
            max_distance=self._eps + _SLACK,
            search=self._search,
            progress=progress,
        )
        return self.find_graph_clusters(distances)

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        return torch.from_numpy(dbscan(distances, self._eps, self._min_samples))

    def advice(self) -> str:
        """Why there may be no cluster, and what to change."""
        return (
            f"none has {self._min_samples} neighbours (itself included) within a Jaccard distance "
            f"of eps = {self._eps}; raise clusterer.eps, lower clusterer.min_samples, or start "
            "from better weights (model.backbone_weights)"
        )


@CLUSTERER.register()
class HDBSCAN(FeatureClusterer):
    """HDBSCAN (Campello et al., PAKDD 2013) on the global features, as scikit-learn computes it.

    Its memory grows with N, its time with N^2 and on one core: for some ten thousand images.

    Args:
        min_cluster_size: Images that make a cluster.
        min_samples: Neighbours in the core distance, the image itself included.
        outliers: `drop`, `nearest` or `singleton`; see `FeatureClusterer`.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self, min_cluster_size: int = 4, min_samples: int = 4, outliers: Outliers = "drop"
    ) -> None:
        super().__init__(outliers)
        if min_cluster_size < 2:
            raise ValueError(f"min_cluster_size: expected 2 or more, got {min_cluster_size}")
        _at_least_one(min_samples=min_samples)
        self._min_cluster_size = min_cluster_size
        self._min_samples = min_samples

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        if len(features) < max(self._min_cluster_size, self._min_samples, 2):
            return torch.full((len(features),), OUTLIER)
        clusterer = sklearn.cluster.HDBSCAN(
            min_cluster_size=self._min_cluster_size,
            min_samples=self._min_samples,
            algorithm="ball_tree",
            copy=True,
        )
        return torch.from_numpy(clusterer.fit_predict(features.cpu().numpy())).long()

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters, -1 = outlier; images that the graph does not join lie at distance 1."""
        count = distances.shape[0]
        if count < max(self._min_cluster_size, self._min_samples, 2):
            return torch.full((count,), OUTLIER)
        clusterer = sklearn.cluster.HDBSCAN(
            min_cluster_size=self._min_cluster_size,
            min_samples=self._min_samples,
            metric="precomputed",
            copy=True,
        )
        joined = _joined_graph(distances, self._min_samples)
        return torch.from_numpy(clusterer.fit_predict(joined)).long()

    def advice(self) -> str:
        """Why there may be no cluster, and what to change."""
        return (
            f"lower clusterer.min_cluster_size ({self._min_cluster_size}) or "
            f"clusterer.min_samples ({self._min_samples})"
        )


@CLUSTERER.register()
class KMeans(FeatureClusterer):
    """Spherical k-means on the global features, as FAISS computes it (Johnson et al. 2019).

    It knows no outliers; every image is in a cluster.

    Args:
        num_clusters: k; at most N.
        iterations: Of Lloyd's algorithm.
        seed: Of the first centres.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, num_clusters: int, iterations: int = 25, seed: int = 0) -> None:
        super().__init__("drop")
        _at_least_one(num_clusters=num_clusters, iterations=iterations)
        self._num_clusters = num_clusters
        self._iterations = iterations
        self._seed = seed

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters.

        Raises:
            ValueError: There are fewer images than clusters.
        """
        if len(features) < self._num_clusters:
            raise ValueError(
                f"num_clusters: expected at most the number of images, {len(features)}, got "
                f"{self._num_clusters}"
            )
        rows = np.ascontiguousarray(features.cpu().numpy())
        kmeans = faiss.Kmeans(
            rows.shape[1],
            self._num_clusters,
            niter=self._iterations,
            spherical=True,
            seed=self._seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rows),
        )
        kmeans.train(rows)
        return torch.from_numpy(kmeans.index.search(rows, 1)[1][:, 0]).long()

    def advice(self) -> str:
        """Every image is in a cluster."""
        return f"clusterer.num_clusters is {self._num_clusters}"


@CLUSTERER.register()
class Agglomerative(FeatureClusterer):
    """Average-linkage clustering of the global features along the Jaccard graph.

    As scikit-learn computes it with a connectivity constraint: only clusters are merged between
    which a k-reciprocal Jaccard distance is below 1, so that memory grows with N. On a ready graph
    the distance of two clusters is the mean over their pairs of images (UPGMA), 1 for a pair that
    the graph does not store; clusters with no stored pair are never merged.

    Args:
        distance_threshold: Clusters further apart, by mean Euclidean distance of unit features
            (0 to 2) or mean distance in the graph (0 to 1), are not merged.
        min_cluster_size: Smaller clusters are outliers.
        k1: Length of the neighbour lists, the image itself included.
        k2: Rows averaged in the local query expansion.
        outliers: `drop`, `nearest` or `singleton`; see `FeatureClusterer`.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        distance_threshold: float = 0.8,
        min_cluster_size: int = 2,
        k1: int = 20,
        k2: int = 6,
        outliers: Outliers = "drop",
    ) -> None:
        super().__init__(outliers)
        if not 0 < distance_threshold <= 2:
            raise ValueError(
                f"distance_threshold: expected above 0 and at most 2, got {distance_threshold}"
            )
        _at_least_one(min_cluster_size=min_cluster_size, k1=k1, k2=k2)
        self._distance_threshold = distance_threshold
        self._min_cluster_size = min_cluster_size
        self._k1 = k1
        self._k2 = k2

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        graph = jaccard_distance(features, self._k1, self._k2, progress=progress)
        components, part_of = connected_components(graph, directed=False)
        rows = features.cpu().numpy()
        found = np.full(len(rows), OUTLIER)
        order = np.argsort(part_of, kind="stable")
        first = 0
        # scikit-learn would join the parts of the graph at the cost of all pairs between them
        for part in np.split(order, np.cumsum(np.bincount(part_of, minlength=components))[:-1]):
            labels = np.zeros(len(part), np.int64)
            if len(part) > 1:
                links = graph[part][:, part]
                links.data[:] = 1  # scikit-learn drops links of distance 0
                labels = sklearn.cluster.AgglomerativeClustering(
                    n_clusters=None,
                    distance_threshold=self._distance_threshold,
                    linkage="average",
                    connectivity=links,
                ).fit_predict(rows[part])
            large = np.bincount(labels)[labels] >= self._min_cluster_size
            found[part[large]] = first + labels[large]
            first += int(labels.max()) + 1
        return torch.from_numpy(found)

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters by the mean distance of their pairs in the graph, -1 = outlier."""
        labels = _average_linkage(distances, self._distance_threshold)
        sizes = np.bincount(labels)
        return torch.from_numpy(np.where(sizes[labels] >= self._min_cluster_size, labels, OUTLIER))

    def advice(self) -> str:
        """Why there may be no cluster, and what to change."""
        return (
            f"raise clusterer.distance_threshold ({self._distance_threshold}) or lower "
            f"clusterer.min_cluster_size ({self._min_cluster_size})"
        )


@CLUSTERER.register()
class Infomap(FeatureClusterer):
    """Two-level Infomap (Rosvall & Bergstrom, PNAS 2008) on links between near images.

    As Cluster Contrast (Dai et al., ACCV 2022) uses it: a directed link from each image to those of
    its k1 nearest neighbours whose cosine similarity is at least `min_similarity`, with the
    similarity as its weight. On a ready graph of distances the weight is 1 - distance. It needs the
    package `infomap` (GPL-3.0-or-later): `pip install 'reid[infomap]'`.

    Args:
        k1: Length of the neighbour lists, the image itself included.
        min_similarity: Weakest link, above 0 and at most 1.
        min_cluster_size: Smaller clusters are outliers.
        seed: Of its search.
        trials: Searches, of which the best is taken.
        outliers: `drop`, `nearest` or `singleton`; see `FeatureClusterer`.

    Raises:
        ValueError: A number is out of its range.
        ConfigError: The package is not installed.
    """

    def __init__(
        self,
        k1: int = 15,
        min_similarity: float = 0.5,
        min_cluster_size: int = 5,
        seed: int = 1,
        trials: int = 1,
        outliers: Outliers = "drop",
    ) -> None:
        super().__init__(outliers)
        _at_least_one(k1=k1, min_cluster_size=min_cluster_size, seed=seed, trials=trials)
        if not 0 < min_similarity <= 1:
            raise ValueError(
                f"min_similarity: expected above 0 and at most 1, got {min_similarity}"
            )
        try:
            self._package = importlib.import_module("infomap")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "clusterer.name: Infomap needs the package infomap (GPL-3.0-or-later); "
                "run: pip install infomap"
            ) from error
        self._k1 = k1
        self._min_similarity = min_similarity
        self._min_cluster_size = min_cluster_size
        self._seed = seed
        self._trials = trials

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        count = len(features)
        features = F.normalize(features.cpu(), dim=1)
        lists = nearest_neighbors(features, min(self._k1, count), progress=progress)[:, 1:]
        links = []
        for start in range(0, count, 4096):
            near = torch.from_numpy(lists[start : start + 4096]).long()
            similarity = torch.einsum("nd,nkd->nk", features[start : start + 4096], features[near])
            rows, columns = (similarity >= self._min_similarity).nonzero(as_tuple=True)
            links.append(
                torch.stack(
                    (
                        (rows + start).double(),
                        near[rows, columns].double(),
                        similarity[rows, columns].double(),
                    ),
                    1,
                )
            )
        return self._modules(torch.cat(links), count)

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters, -1 = outlier."""
        entries = distances.tocoo()
        weight = 1 - entries.data.astype(np.float64)
        linked = (entries.row != entries.col) & (weight >= self._min_similarity)
        links = np.stack((entries.row[linked], entries.col[linked], weight[linked]), 1)
        return self._modules(torch.from_numpy(links), distances.shape[0])

    def _modules(self, links: Tensor, count: int) -> Tensor:
        found = torch.full((count,), OUTLIER)
        if not len(links):
            return found
        network = self._package.Infomap(
            two_level=True,
            directed=True,
            silent=True,
            seed=self._seed,
            num_trials=self._trials,
        )
        network.add_links(links.numpy())
        result = network.run()
        modules = result.modules()
        nodes = torch.tensor(list(modules))
        labels = torch.unique(torch.tensor(list(modules.values())), return_inverse=True)[1]
        large = torch.bincount(labels)[labels] >= self._min_cluster_size
        found[nodes[large]] = labels[large]
        return found

    def advice(self) -> str:
        """Why there may be no cluster, and what to change."""
        return (
            f"lower clusterer.min_similarity ({self._min_similarity}) or "
            f"clusterer.min_cluster_size ({self._min_cluster_size})"
        )


def _check_graph(distances: scipy.sparse.csr_matrix) -> None:
    """Raises ValueError where `graph_clusters` cannot take the graph."""
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


def _number_outliers(found: Tensor) -> None:
    """Makes a cluster of its own of each outlier, in place."""
    lost = found == OUTLIER
    first = int(found.max()) + 1
    found[lost] = torch.arange(first, first + int(lost.sum()))


def _joined_graph(distances: scipy.sparse.csr_matrix, least: int) -> scipy.sparse.csr_matrix:
    """The graph in one piece, with at least `least` entries a row.

    Pairs that are not stored lie at distance 1: storing some of them changes nothing. Distances of
    0 become 1e-12, since spanning trees take a 0 for no link.
    """
    count = distances.shape[0]
    part_of = connected_components(distances, directed=False)[1]
    first = np.unique(part_of, return_index=True)[1]
    pairs = {(int(a), int(b)) for a, b in itertools.pairwise(first)}
    stored = np.diff(distances.indptr)
    for i in np.flatnonzero(stored < least).tolist():
        own = set(distances.indices[distances.indptr[i] : distances.indptr[i + 1]].tolist())
        others = [j for j in range(min(count, 2 * least)) if j != i and j not in own]
        pairs.update((min(i, j), max(i, j)) for j in others[: least - stored[i]])
    entries = distances.tocoo()
    present = set(zip(entries.row.tolist(), entries.col.tolist(), strict=True)) if pairs else set()
    added = np.array(sorted(pairs - present), np.int64).reshape(-1, 2)
    rows = np.concatenate((entries.row, added[:, 0], added[:, 1]))
    columns = np.concatenate((entries.col, added[:, 1], added[:, 0]))
    data = np.concatenate((np.maximum(entries.data, 1e-12), np.ones(2 * len(added))))
    return scipy.sparse.csr_matrix((data.astype(np.float64), (rows, columns)), distances.shape)


def _average_linkage(distances: scipy.sparse.csr_matrix, threshold: float) -> Labels:
    """(N,) clusters from 0 by UPGMA on a sparse graph; what is not stored is 1.

    The sum of 1 - distance over the pairs of two clusters adds up when clusters merge, so that only
    sums above 0 are kept. Equal distances are merged in the order of the images.
    """
    count = distances.shape[0]
    entries = distances.tocoo()
    sums: list[dict[int, float]] = [{} for _ in range(count)]
    for i, j, d in zip(
        entries.row.tolist(), entries.col.tolist(), entries.data.tolist(), strict=True
    ):
        if i != j and d < 1:
            sums[i][j] = 1 - d
    sizes = [1] * count
    parent = list(range(count))
    heap = [(1 - s, i, j) for i, row in enumerate(sums) for j, s in row.items() if i < j]
    heapq.heapify(heap)
    while heap and heap[0][0] <= threshold:
        distance, i, j = heapq.heappop(heap)
        if parent[i] != i or parent[j] != j:
            continue
        if distance != 1 - sums[i][j] / (sizes[i] * sizes[j]):
            continue  # of the clusters as they were before a merge
        parent[j] = i
        sizes[i] += sizes[j]
        del sums[i][j], sums[j][i]
        for k, s in sums[j].items():
            del sums[k][j]
            sums[i][k] = sums[i].get(k, 0.0) + s
            sums[k][i] = sums[i][k]
        sums[j] = {}
        for k, s in sums[i].items():
            heapq.heappush(heap, (1 - s / (sizes[i] * sizes[k]), min(i, k), max(i, k)))
    for i in range(count):
        parent[i] = parent[parent[i]]  # a parent has the smaller number, so it is a root by now
    found: Labels = np.unique(parent, return_inverse=True)[1]
    return found


def _at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")


def cluster_statistics(
    labels: PseudoLabels,
    pids: Tensor,
    features: FeatureSet | None = None,
    last_clusters: Tensor | None = None,
) -> dict[str, float]:
    """Numbers that tell whether an epoch's labels are any good.

    Args:
        labels: Of N images.
        pids: (N,) identities for comparison, -1 = unknown.
        features: Of the N images.
        last_clusters: (N,) clusters of the last epoch, -1 = outlier.

    Returns:
        `clusters`, `proxies`, `outliers`, `images/cluster`, `largest` (images in the largest
        cluster) and `cross-camera` (share of the clusters that have several cameras; 0 where
        clusters are not split by camera). With features, `silhouette` of a sample of at most 2,000
        clustered images (Rousseeuw 1987). With the last clusters, `agreement`: the adjusted Rand
        index over the images clustered in both. Over the clustered images whose identity is known,
        if there are any, `purity`: the share that has its cluster's most frequent identity, `ARI`:
        the adjusted Rand index (Hubert & Arabie 1985), and `NMI`: normalised mutual information.
    """
    cluster, pids = labels.cluster.cpu(), pids.cpu()
    kept = cluster != OUTLIER
    sizes = torch.bincount(cluster[kept], minlength=1)
    cameras = torch.bincount(labels.proxy_to_cluster.cpu(), minlength=1)
    numbers: dict[str, float] = {
        "clusters": labels.num_clusters,
        "proxies": labels.num_proxies,
        "outliers": labels.num_outliers,
        "images/cluster": int(kept.sum()) / max(labels.num_clusters, 1),
        "largest": int(sizes.max()),
        "cross-camera": int((cameras > 1).sum()) / max(labels.num_clusters, 1),
    }
    if features is not None:
        sample = kept.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(0)
        sample = sample[torch.randperm(len(sample), generator=generator)[:_SILHOUETTE_SAMPLE]]
        chosen = cluster[sample].numpy()
        if 1 < len(np.unique(chosen)) < len(chosen):
            rows = features.global_feat[sample.to(features.global_feat.device)]
            numbers["silhouette"] = float(silhouette_score(rows.cpu().numpy(), chosen))
    if last_clusters is not None and len(last_clusters) == len(labels):
        before = last_clusters.cpu()
        both = kept & (before != OUTLIER)
        if bool(both.any()):
            numbers["agreement"] = _rand(before[both], cluster[both])
    known = kept & (pids != UNLABELLED)
    if bool(known.any()):
        pairs, counts = torch.unique(
            torch.stack((cluster[known], pids[known])), dim=1, return_counts=True
        )
        largest = torch.zeros(labels.num_clusters, dtype=counts.dtype)
        largest.scatter_reduce_(0, pairs[0], counts, "amax")
        numbers["purity"] = int(largest.sum()) / int(known.sum())
        numbers["ARI"] = _rand(pids[known], cluster[known])
        numbers["NMI"] = float(
            normalized_mutual_info_score(pids[known].numpy(), cluster[known].numpy())
        )
    return numbers


def cluster_warning(numbers: dict[str, float], count: int) -> str | None:
    """What to change where the statistics of `count` images look ill, or None."""
    if numbers["outliers"] > 0.9 * count:
        return (
            f"{numbers['outliers']:,.0f} of {count:,} images are outliers: raise clusterer.eps or "
            "lower clusterer.min_samples; if that does not help, the weights that training starts "
            "from are too weak (model.backbone_weights)"
        )
    if numbers["largest"] > count / 3:
        return (
            f"one cluster holds {numbers['largest']:,.0f} of {count:,} images: lower clusterer.eps "
            "or solver.base_lr; clusters that follow cameras instead of persons look the same"
        )
    return None


def _rand(one: Tensor, other: Tensor) -> float:
    return float(adjusted_rand_score(one.numpy(), other.numpy()))
