"""Jaccard-DBSCAN clusters, split by camera."""

from __future__ import annotations

from reid.labelling import JaccardDBSCAN
from reid.registry import CLUSTERER
from reid.structures import FeatureSet, ProgressBar, PseudoLabels


@CLUSTERER.register()
class CameraProxyClusterer(JaccardDBSCAN):
    """Jaccard-DBSCAN clusters, each split by camera into proxies (CAP; O2CAP; TMGF, section 3.3).

    Proxies are numbered by cluster, then camera; a cluster has a proxy for each of its cameras. The
    options are those of `JaccardDBSCAN`.
    """

    def __call__(self, features: FeatureSet, progress: ProgressBar | None = None) -> PseudoLabels:
        """Labels of the N images, on the CPU.

        Raises:
            ClusteringError: There is no cluster.
            ValueError: There is no image, or a feature is not finite.
        """
        return PseudoLabels.from_clusters(self.clusters(features, progress), features.camids.cpu())
