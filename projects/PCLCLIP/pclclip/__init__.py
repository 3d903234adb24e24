"""PCL-CLIP as a plug-in: importing this package registers its head and its names of weights.

Li and Gong, *Prototypical Contrastive Learning-based CLIP Fine-tuning for Object
Re-identification* (arXiv:2310.17218, 2023), on the backbone `CLIPViT` and the loss
`ClusterContrastLoss`.
"""

import reid.projects.pclclip.formats  # noqa: F401  (registers the format)
from reid.projects.clustercontrast import ClusterContrastLoss
from reid.projects.pclclip.head import TwoNeckHead

__all__ = ["ClusterContrastLoss", "TwoNeckHead"]
