"""HCT as a plug-in: importing this package registers it and BUC's head.

Zeng et al., *Hierarchical Clustering with Hard-batch Triplet Loss for Person Re-identification*
(CVPR 2020).
"""

from reid.projects.buc import EmbeddingHead
from reid.projects.hct.clusterer import HierarchicalClusterer

__all__ = ["EmbeddingHead", "HierarchicalClusterer"]
