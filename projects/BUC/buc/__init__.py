"""BUC as a plug-in: importing this package registers it.

Lin et al., *A Bottom-Up Clustering Approach to Unsupervised Person Re-Identification* (AAAI 2019).
"""

from reid.projects.buc.head import EmbeddingHead
from reid.projects.buc.labeller import BottomUp
from reid.projects.buc.loss import BUCLoss

__all__ = ["BUCLoss", "BottomUp", "EmbeddingHead"]
