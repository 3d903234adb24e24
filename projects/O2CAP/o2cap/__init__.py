"""O2CAP as a plug-in: importing this package registers its loss, and CAP's parts, which it extends.

Wang et al., *Offline-Online Associated Camera-Aware Proxies for Unsupervised Person
Re-identification* (TIP 2022).
"""

from reid.projects.cap import CameraProxyClusterer
from reid.projects.o2cap.loss import O2CAPLoss

__all__ = ["CameraProxyClusterer", "O2CAPLoss"]
