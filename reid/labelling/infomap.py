"""Infomap, through the optional package `infomap`."""

from __future__ import annotations

import importlib

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.labelling.base import FeatureClusterer, Outliers, at_least_one
from reid.neighbors import nearest_neighbors, neighbors_memory_mb
from reid.registry import CLUSTERER, ConfigError
from reid.structures import OUTLIER, ProgressBar


@CLUSTERER.register()
class Infomap(FeatureClusterer):
    """Two-level Infomap (Rosvall & Bergstrom, PNAS 2008) on links between near images.

    As in Cluster Contrast (Dai et al., ACCV 2022), each image has a directed link to each of its k1
    nearest neighbours whose cosine similarity is at least `min_similarity`; the similarity is the
    link's weight. On a ready graph of distances the weight is 1 - distance. It needs the
    package `infomap` (GPL-3.0-or-later): `pip install 'reid[infomap]'`. Ctrl-C works
    only after the package has finished its search.

    Args:
        k1: Length of the neighbour lists, the image itself included.
        min_similarity: Weakest link, above 0 and at most 1.
        min_cluster_size: Smaller clusters are outliers.
        seed: Seed of the search.
        trials: Number of searches; the best result counts.
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
        at_least_one(k1=k1, min_cluster_size=min_cluster_size, seed=seed, trials=trials)
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

    def memory_mb(self, count: int, dim: int) -> float:
        """About how many MB: the neighbour search, and k1 links an image of some 250 bytes."""
        return neighbors_memory_mb(count, dim, self._k1) + 250 * count * self._k1 / 2**20

    def how_to_loosen(self) -> str:
        """What to change for fewer outliers."""
        return (
            f"lower {self.config_key}.min_similarity ({self._min_similarity}) or "
            f"{self.config_key}.min_cluster_size ({self._min_cluster_size})"
        )

    def how_to_tighten(self) -> str:
        """What to change for smaller clusters."""
        return f"raise {self.config_key}.min_similarity ({self._min_similarity})"
