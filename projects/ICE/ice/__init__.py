"""ICE as a plug-in: importing this package registers its losses and its sampler.

Chen et al., *ICE: Inter-instance Contrastive Encoding for Unsupervised Person Re-identification*
(ICCV 2021).
"""

from reid.projects.ice.camera_loss import ICECameraLoss
from reid.projects.ice.loss import ICELoss
from reid.projects.ice.sampler import MoreCamerasSampler

__all__ = ["ICECameraLoss", "ICELoss", "MoreCamerasSampler"]
