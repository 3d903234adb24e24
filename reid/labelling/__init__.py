"""Clusterers and labellers: features become pseudo-labels."""

from reid.labelling.agglomerative import Agglomerative
from reid.labelling.base import (
    Clusterer,
    ClusteringError,
    FeatureClusterer,
    Outliers,
    cluster_present,
    number_outliers,
)
from reid.labelling.hdbscan import HDBSCAN
from reid.labelling.health import cluster_statistics
from reid.labelling.infomap import Infomap
from reid.labelling.jaccard_dbscan import JaccardDBSCAN
from reid.labelling.kmeans import KMeans
from reid.labelling.labellers import Clusters, Identities, Labeller
from reid.labelling.per_domain import PerDomain

__all__ = [
    "HDBSCAN",
    "Agglomerative",
    "Clusterer",
    "ClusteringError",
    "Clusters",
    "FeatureClusterer",
    "Identities",
    "Infomap",
    "JaccardDBSCAN",
    "KMeans",
    "Labeller",
    "Outliers",
    "PerDomain",
    "cluster_present",
    "cluster_statistics",
    "number_outliers",
]
