"""SSG as a plug-in: importing this package registers its parts.

Fu et al., *Self-similarity Grouping: A Simple Unsupervised Cross Domain Adaptation Approach for
Person Re-identification* (ICCV 2019).
"""

from reid.projects.ssg.head import SelfSimilarityHead
from reid.projects.ssg.loss import SSGLoss
from reid.projects.ssg.sampler import PassSampler

__all__ = ["PassSampler", "SSGLoss", "SelfSimilarityHead"]
