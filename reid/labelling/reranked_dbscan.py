"""DBSCAN on the Jaccard distance of re-ranking, with a source term and an eps from the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from reid.labelling.base import FeatureClusterer, Outliers, at_least_one
from reid.labelling.epsilon import eps_of_share
from reid.neighbors import (
    TIE_TOLERANCE,
    Search,
    SparseDistances,
    dbscan,
    jaccard_memory_mb,
    reranked_jaccard,
    source_push,
)
from reid.registry import CLUSTERER, Range
from reid.structures import FeatureSet, ProgressBar

logger = logging.getLogger(__name__)


@CLUSTERER.register()
class RerankedDBSCAN(FeatureClusterer):
    """DBSCAN on the distance of SSG and MMT, with their eps; see `reranked_jaccard`.

    It differs from `JaccardDBSCAN` in the lists, which have k1 + 1 entries, and in the weights,
    which come from distances divided by the largest of their row. Fu et al., *Self-similarity
    Grouping* (ICCV 2019); Ge et al., *Mutual Mean-Teaching* (ICLR 2020).

    With `eps: rho`, the first features give eps, and it stays: checkpoints hold it. With a source
    term an image counts among its own neighbours only if its distance to itself is within eps, as
    in the published code.

    No N x N and no N x M array exists. At 32,621 images the weights take about 100 MB. The graph
    holds the pairs with a common neighbour, 8 bytes each: all of them while eps is made, later only
    those within eps.

    Args:
        k1: Length of the neighbour lists, without the image itself.
        k2: Rows averaged in the local query expansion.
        eps: Largest distance of neighbours, above 0 and below 1 - source_weight; or `rho`.
        rho: Share of all pairs, those with the smallest distances; their mean is eps.
        source_weight: lambda, the weight of the distance from a labelled source; 0: no source.
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
        eps: float | Literal["rho"] = "rho",
        rho: Annotated[float, Range(0, 1, above=True)] = 1.6e-3,
        source_weight: Annotated[float, Range(0, 1, below=True)] = 0.0,
        min_samples: int = 4,
        outliers: Outliers = "drop",
        search: Search = "exact",
    ) -> None:
        super().__init__(outliers)
        at_least_one(k1=k1, k2=k2, min_samples=min_samples)
        if not 0 < rho <= 1 or not 0 <= source_weight < 1:
            raise ValueError(
                "expected rho above 0 and at most 1, and source_weight from 0 to below 1; got "
                f"{rho}, {source_weight}"
            )
        if eps != "rho" and not 0 < eps < 1 - source_weight:
            raise ValueError(
                f"eps: expected 0 < eps < {1 - source_weight:g} (1 - source_weight), or rho, got "
                f"{eps}"
            )
        self._k1 = k1
        self._k2 = k2
        self._rho = rho
        self._by_rho = eps == "rho"
        self._eps: float | None = None if eps == "rho" else eps
        self._source_weight = source_weight
        self._min_samples = min_samples
        self._search: Search = search
        self._source: Tensor | None = None

    @property
    def choices(self) -> Mapping[str, float]:
        """The eps that rho gave; empty before, and for a given eps."""
        return {"eps": self._eps} if self._by_rho and self._eps is not None else {}

    @property
    def uses_source(self) -> bool:
        """Whether each call needs the features of the labelled source."""
        return self._source_weight > 0

    def take_source(self, features: FeatureSet) -> None:
        """Takes the source's features for the next call, which frees them."""
        self._source = features[features.present].test

    def find_clusters(self, features: Tensor, progress: ProgressBar | None) -> Tensor:
        """(N,) clusters, -1 = outlier.

        Raises:
            ValueError: The source's features are missing or do not fit; or eps is so large that
                pairs without a common neighbour are within it.
        """
        push = None
        if self._source_weight:
            if self._source is None:
                raise ValueError(
                    "source_weight above 0 needs the features of a labelled source; set "
                    f"datasets.source, or {self.config_key}.source_weight 0"
                )
            push = source_push(features, self._source)
            self._source = None
        distances = reranked_jaccard(
            features,
            self._k1,
            self._k2,
            push=push,
            source_weight=self._source_weight,
            max_distance=math.inf if self._eps is None else self._eps + 10 * TIE_TOLERANCE,
            search=self._search,
            progress=progress,
        )
        return self._clusters_of(distances)

    def find_graph_clusters(self, distances: scipy.sparse.csr_matrix) -> Tensor:
        """(N,) clusters of a ready graph, -1 = outlier; a source term is not added."""
        return self._clusters_of(SparseDistances(distances, 1.0, np.zeros(distances.shape[0])))

    def _clusters_of(self, distances: SparseDistances) -> Tensor:
        if self._eps is None:
            self._eps = eps_of_share(distances, self._rho)
            logger.info(
                "eps %.4f is the mean of the smallest %g %% of all distances, from now on",
                self._eps,
                100 * self._rho,
            )
        least = distances.least_missing
        if self._eps + TIE_TOLERANCE >= least:
            raise ValueError(
                f"eps {self._eps:.4f} reaches pairs without any common neighbour, which are "
                f"{least:.4f} apart or more; lower {self.config_key}.rho ({self._rho:g})"
            )
        found = dbscan(
            distances.graph, self._eps, self._min_samples, always_itself=not self._source_weight
        )
        return torch.from_numpy(found)

    def memory_mb(self, count: int, dim: int) -> float:
        """About how many MB the distances take, without the graph."""
        return jaccard_memory_mb(count, dim, self._k1 + 1, self._k2)

    def how_to_loosen(self) -> str:
        """What to change for fewer outliers."""
        return (
            f"raise {self.config_key}.{self._shown_eps()} or lower "
            f"{self.config_key}.min_samples ({self._min_samples})"
        )

    def how_to_tighten(self) -> str:
        """What to change for smaller clusters."""
        return f"lower {self.config_key}.{self._shown_eps()}"

    def _shown_eps(self) -> str:
        if not self._by_rho:
            return f"eps ({self._eps:g})"
        gave = "" if self._eps is None else f", which gave eps {self._eps:.4f}"
        return f"rho ({self._rho:g}{gave})"

    def state_dict(self) -> dict[str, Any]:
        """The eps that rho gave."""
        return dict(self.choices)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores eps.

        Raises:
            ValueError: It is no number above 0.
        """
        eps = state.get("eps")
        if eps is not None and not (isinstance(eps, float) and 0 < eps < 2):
            raise ValueError(f"eps: expected a number above 0 and below 2, got {eps!r}")
        if self._by_rho:
            self._eps = eps
