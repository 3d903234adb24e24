"""CAP as a plug-in: importing this package registers it.

Wang et al., *Camera-aware Proxies for Unsupervised Person Re-Identification* (AAAI 2021).
"""

from reid.projects.cap.clusterer import CameraProxyClusterer
from reid.projects.cap.loss import CAPLoss

__all__ = ["CAPLoss", "CameraProxyClusterer"]
