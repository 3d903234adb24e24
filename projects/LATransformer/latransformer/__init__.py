"""LA-Transformer as a plug-in: importing this package registers its parts.

Sharma, Kapil, Chattopadhyay: *Person Re-Identification with a Locally Aware Transformer*
(arXiv:2106.03720). The classifiers are the core's `BottleneckCrossEntropy`.
"""

import reid.projects.latransformer.formats  # noqa: F401  (registers the format)
from reid.projects.latransformer.evaluator import LATransformerEvaluator
from reid.projects.latransformer.head import LAHead

__all__ = ["LAHead", "LATransformerEvaluator"]
