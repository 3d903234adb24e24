"""PFD as a plug-in: importing this package registers its head, its loss and its heatmaps.

Wang, Liu, Song, Guo, Hao: *Pose-guided Feature Disentangling for Occluded Person Re-identification
Based on Transformer* (AAAI 2022).
"""

import reid.projects.pfd.formats  # noqa: F401
from reid.projects.pfd.head import PFDHead
from reid.projects.pfd.heatmaps import (
    DrawnHeatmaps,
    PoseHeatmaps,
    heatmaps_of_joints,
    write_heatmaps,
)
from reid.projects.pfd.loss import PFDLoss
from reid.projects.pfd.pose import HEATMAP, JOINTS, POSE, PoseEstimator

__all__ = [
    "HEATMAP", "JOINTS", "POSE", "DrawnHeatmaps", "PFDHead", "PFDLoss", "PoseEstimator",
    "PoseHeatmaps", "heatmaps_of_joints", "write_heatmaps",
]  # fmt: skip
