"""MMT as a plug-in: importing this package registers its loss.

Ge, Chen and Li, *Mutual Mean-Teaching: Pseudo Label Refinery for Unsupervised Domain Adaptation on
Person Re-identification* (ICLR 2020).
"""

from reid.projects.mmt.loss import MMTLoss

__all__ = ["MMTLoss"]
