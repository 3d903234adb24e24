"""Cluster Contrast as a plug-in: importing this package registers its loss.

Dai et al., *Cluster Contrast for Unsupervised Person Re-Identification* (ACCV 2022).
"""

from reid.projects.clustercontrast.loss import ClusterContrastLoss

__all__ = ["ClusterContrastLoss"]
