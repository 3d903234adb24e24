"""CAP as a plug-in: importing this package registers it.

Wang et al., *Camera-aware Proxies for Unsupervised Person Re-Identification* (AAAI 2021).
"""

from cap.loss import CAPLoss

__all__ = ["CAPLoss"]
