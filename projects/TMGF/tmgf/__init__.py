"""TMGF as a plug-in: importing this package registers its parts.

*Transformer Based Multi-Grained Features for Unsupervised Person Re-Identification* (Li, Wang,
Gong; WACV workshops 2023), on `O2CAPLoss` (Wang et al., *Offline-Online Associated Camera-Aware
Proxies for Unsupervised Person Re-identification*, TIP 2022).
"""

import reid.projects.tmgf.formats  # noqa: F401  (registers the formats)
from reid.projects.o2cap import CameraProxyClusterer, O2CAPLoss
from reid.projects.tmgf.backbone import IBNViT
from reid.projects.tmgf.head import TMGFHead

__all__ = ["CameraProxyClusterer", "IBNViT", "O2CAPLoss", "TMGFHead"]
