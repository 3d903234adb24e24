"""TransReID as a plug-in: importing this package registers its head.

He, Luo, Wang, Wang, Li, Jiang: *TransReID: Transformer-based Object Re-Identification* (ICCV 2021).
Overlapping patches and the vectors of cameras and viewpoints are options of the core's `ViT`.
"""

from reid.projects.transreid.head import JPMHead, jigsaw_order

__all__ = ["JPMHead", "jigsaw_order"]
