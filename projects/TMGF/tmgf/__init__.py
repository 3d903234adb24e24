"""TMGF as plug-ins: importing this package registers them.

*Transformer Based Multi-Grained Features for Unsupervised Person Re-Identification* (Li, Wang,
Gong; WACV workshops 2023), on the losses of O2CAP (Wang et al., *Offline-Online Associated
Camera-Aware Proxies for Unsupervised Person Re-identification*, TIP 2022).
"""

from tmgf.backbone import IBNViT
from tmgf.clusterer import CameraProxyClusterer
from tmgf.head import TMGFHead
from tmgf.losses import O2CAPLoss
from tmgf.memory import ProxyMemory

__all__ = ["CameraProxyClusterer", "IBNViT", "O2CAPLoss", "ProxyMemory", "TMGFHead"]
