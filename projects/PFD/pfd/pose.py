"""Joints, and what finds them in images."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from reid.registry import PART_OF, Registry

HEATMAP = "heatmap"
"""Name of the heatmaps in `Batch.side`."""

JOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
    "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip
"""COCO's joints; left and right are the person's."""

MIRRORED_JOINTS = (0, *(place + 1 if place % 2 else place - 1 for place in range(1, len(JOINTS))))
"""The joint whose place each joint takes in the mirror image: left and right change places."""

POSE = Registry("POSE")


class PoseEstimator(ABC):
    """What is registered in POSE, for `MODEL.HEAD.POSE`: finds joints in the network's input."""

    @abstractmethod
    def __call__(self, image: Tensor) -> Tensor:
        """Heatmaps (B, 17, h, w) of COCO's joints, whose peaks are confidences of about 0 to 1.

        Called without gradients. The estimator keeps its weights to itself, on the images' device.

        Args:
            image: (B, 3, H, W) as the network sees them: augmented, normalised, boxes erased.
        """


PART_OF[PoseEstimator] = POSE
