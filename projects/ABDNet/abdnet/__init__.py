"""ABD-Net as a plug-in: importing this package registers its parts.

Chen et al.: *ABD-Net: Attentive but Diverse Person Re-Identification* (ICCV 2019). The attention
modules are the core's (`reid.modeling.attention`), and so are the losses of identities.
"""

import reid.projects.abdnet.formats  # noqa: F401  (registers the formats)
from reid.projects.abdnet.head import ABDHead
from reid.projects.abdnet.orthogonality import FeatureOrthogonality, WeightOrthogonality

__all__ = ["ABDHead", "FeatureOrthogonality", "WeightOrthogonality"]
