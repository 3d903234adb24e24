"""Clusterers: features become pseudo-labels."""

from reid.clustering.agglomerative import Agglomerative
from reid.clustering.base import (
    Clusterer,
    ClusteringError,
    FeatureClusterer,
    Outliers,
    cluster_readable,
)
from reid.clustering.dbscan import CameraProxyClusterer, JaccardDBSCAN
from reid.clustering.hdbscan import HDBSCAN
from reid.clustering.health import cluster_statistics
from reid.clustering.infomap import Infomap
from reid.clustering.kmeans import KMeans

__all__ = [
    "HDBSCAN",
    "Agglomerative",
    "CameraProxyClusterer",
    "Clusterer",
    "ClusteringError",
    "FeatureClusterer",
    "Infomap",
    "JaccardDBSCAN",
    "KMeans",
    "Outliers",
    "cluster_readable",
    "cluster_statistics",
]
