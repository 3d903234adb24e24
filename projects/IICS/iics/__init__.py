"""IICS as a plug-in: importing this package registers it.

Xuan & Zhang, *Intra-Inter Camera Similarity for Unsupervised Person Re-Identification* (CVPR 2021).
"""

from reid.projects.iics import formats
from reid.projects.iics.backbone import AIBN, AIBNResNet
from reid.projects.iics.head import PooledHead
from reid.projects.iics.labellers import InterCamera, IntraCamera
from reid.projects.iics.loss import ClusterCrossEntropy
from reid.projects.iics.sampler import EveryCameraSampler

__all__ = [
    "AIBN",
    "AIBNResNet",
    "ClusterCrossEntropy",
    "EveryCameraSampler",
    "InterCamera",
    "IntraCamera",
    "PooledHead",
    "formats",
]
