"""SpCL as a plug-in: importing this package registers its parts.

Ge et al., *Self-paced Contrastive Learning with Hybrid Memory for Domain Adaptive Object Re-ID*
(NeurIPS 2020).
"""

from reid.projects.spcl.clusterer import SelfPacedDBSCAN
from reid.projects.spcl.loss import SpCLLoss
from reid.projects.spcl.sampler import MultiGallerySampler

__all__ = ["MultiGallerySampler", "SelfPacedDBSCAN", "SpCLLoss"]
