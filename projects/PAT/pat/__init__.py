"""PAT as a plug-in, by our working definition: importing this package registers its head.

After the abstract of Li et al., *Diverse Part Discovery: Occluded Person Re-identification with
Part-Aware Transformer* (CVPR 2021), whose text and code were not at hand. No result of this package
is a result of that method. The loss that keeps parts apart is the core's `PartDiversity`.
"""

from reid.projects.pat.head import PartPrototypeHead

__all__ = ["PartPrototypeHead"]
