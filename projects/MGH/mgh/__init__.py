"""MGH as a plug-in: importing this package registers it.

Wu et al., *Metadata Guided Hypergraph for Unsupervised Person Re-identification* (ACM MM 2021).
"""

from reid.projects.mgh.labeller import HypergraphLabels
from reid.projects.mgh.loss import MGHLoss
from reid.projects.mgh.sampler import MGHSampler

__all__ = ["HypergraphLabels", "MGHLoss", "MGHSampler"]
