"""RLCC as a plug-in: importing this package registers its loss, and SpCL's parts, which it extends.

Zhang et al., *Refining Pseudo Labels with Clustering Consensus over Generations for Unsupervised
Object Re-identification* (CVPR 2021).
"""

from reid.projects.rlcc.loss import RLCCLoss
from reid.projects.spcl import MultiGallerySampler, SelfPacedDBSCAN

__all__ = ["MultiGallerySampler", "RLCCLoss", "SelfPacedDBSCAN"]
