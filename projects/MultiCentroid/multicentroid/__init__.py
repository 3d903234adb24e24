"""Several centroids for each cluster, as a plug-in: importing this package registers its loss.

A working definition of ours; see the project's README.
"""

from reid.projects.multicentroid.loss import MultiCentroidLoss
from reid.projects.multicentroid.memory import CentroidMemory

__all__ = ["CentroidMemory", "MultiCentroidLoss"]
