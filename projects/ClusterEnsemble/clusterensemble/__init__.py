"""ClusterEnsemble as a plug-in: importing this package registers its parts.

A definition of our own, after the abstract of Sun, Li, Li, *Hybrid Contrastive Learning with
Cluster Ensemble for Unsupervised Person Re-identification* (ACPR 2022). It is not that method.
"""

from reid.projects.clusterensemble.clusterer import EnsembleDBSCAN
from reid.projects.clusterensemble.loss import EnsembleLoss

__all__ = ["EnsembleDBSCAN", "EnsembleLoss"]
