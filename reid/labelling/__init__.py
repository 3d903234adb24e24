"""Clusterers and labellers: features become pseudo-labels."""

from reid.labelling.agglomerative import Agglomerative
from reid.labelling.bank_clusterer import BankClusterer
from reid.labelling.base import (
    Clusterer,
    ClusteringError,
    FeatureClusterer,
    Outliers,
    cluster_present,
    number_outliers,
)
from reid.labelling.camera_clusterers import CameraClusterer, CrossCameraMerger
from reid.labelling.hdbscan import HDBSCAN
from reid.labelling.health import cluster_statistics
from reid.labelling.infomap import Infomap
from reid.labelling.jaccard_dbscan import JaccardDBSCAN
from reid.labelling.kmeans import KMeans
from reid.labelling.labellers import Clusters, Identities, Labeller
from reid.labelling.per_domain import PerDomain
from reid.labelling.reranked_dbscan import RerankedDBSCAN

__all__ = [
    "HDBSCAN",
    "Agglomerative",
    "BankClusterer",
    "CameraClusterer",
    "Clusterer",
    "ClusteringError",
    "Clusters",
    "CrossCameraMerger",
    "FeatureClusterer",
    "Identities",
    "Infomap",
    "JaccardDBSCAN",
    "KMeans",
    "Labeller",
    "Outliers",
    "PerDomain",
    "RerankedDBSCAN",
    "cluster_present",
    "cluster_statistics",
    "number_outliers",
]
