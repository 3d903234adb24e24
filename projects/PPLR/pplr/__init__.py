"""PPLR as a plug-in: importing this package registers its losses.

Cho et al., *Part-based Pseudo Label Refinement for Unsupervised Person Re-identification*
(CVPR 2022).
"""

from reid.projects.pplr.camera import PPLRCameraLoss
from reid.projects.pplr.loss import PPLRLoss

__all__ = ["PPLRCameraLoss", "PPLRLoss"]
