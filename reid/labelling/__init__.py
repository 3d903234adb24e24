"""Clusterers: features become pseudo-labels."""

from reid.labelling.agglomerative import Agglomerative
from reid.labelling.base import (
    Clusterer,
    ClusteringError,
    FeatureClusterer,
    Outliers,
    cluster_readable,
)
from reid.labelling.hdbscan import HDBSCAN
from reid.labelling.health import cluster_statistics
from reid.labelling.infomap import Infomap
from reid.labelling.jaccard_dbscan import JaccardDBSCAN
from reid.labelling.kmeans import KMeans

__all__ = [
    "HDBSCAN",
    "Agglomerative",
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
