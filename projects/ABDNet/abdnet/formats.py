"""The tensor names of the ABD-Net authors' checkpoints.

Their branches are in the order of a hash set, so it differs from file to file: there is a format
for each order.
"""

from __future__ import annotations

from reid.modeling.formats import Format, Rule, register_format

_CLASSIFIER = "classifier of the training identities"
_HEAD = "for MODEL.BACKBONE {NAME: TimmBackbone, ATTENTION: {layer1: channels}} and MODEL.HEAD"
_LOOKS = {"before": "identity", "cam": "channels", "pam": "positions"}
_LAYERS = {"conv5c": "reduce", "conv52": "refine", "conv7": "expand"}
_CONVOLUTIONS = {"query_conv": "query", "key_conv": "key", "value_conv": "value"}


def _looks() -> tuple[Rule, ...]:
    """Rules for the three modules of the attentive branch, with and without convolutions."""
    rules = []
    for theirs, ours in _LOOKS.items():
        start = rf"branches\.\d\.1\.{theirs}_module\."
        rules += [
            Rule(rf"{start}{layer}\.(.+)", rf"head.{ours}.{name}.\1")
            for layer, name in _LAYERS.items()
        ]
        for block, inside in (("attention_module\\.", "attention."), ("", "")):
            rules.append(Rule(rf"{start}{block}gamma", f"head.{ours}.{inside}gamma"))
            rules += [
                Rule(rf"{start}{block}{layer}\.(.+)", rf"head.{ours}.{inside}{name}.\1")
                for layer, name in _CONVOLUTIONS.items()
            ]
    return tuple(rules)


for _name, _global, _attentive in (("abd-net", 0, 1), ("abd-net-attentive-first", 1, 0)):
    register_format(
        Format(
            _name,
            "the authors of ABD-Net: a ResNet with two branches, the "
            + ("global" if _global == 0 else "attentive")
            + " one first",
            (
                Rule(r"common_branch\.backbone1\.0\.(.+)", r"backbone.net.conv1.\1"),
                Rule(r"common_branch\.backbone1\.1\.(.+)", r"backbone.net.bn1.\1"),
                Rule(r"common_branch\.backbone1\.4\.(.+)", r"backbone.net.layer1.\1"),
                Rule(
                    r"common_branch\.shallow_cam\._cam_module\.gamma",
                    "backbone.net.layer1.attention.gamma",
                ),
                Rule(r"common_branch\.backbone2\.0\.(.+)", r"backbone.net.layer2.\1"),
                Rule(r"common_branch\.backbone2\.1\.(.+)", r"backbone.net.layer3.\1"),
                Rule(rf"branches\.{_global}\.0\.backbone\.(.+)", r"head.last_stages.0.\1"),
                Rule(rf"branches\.{_attentive}\.0\.backbone\.(.+)", r"head.last_stages.1.\1"),
                Rule(rf"branches\.{_global}\.1\.fc\.(.+)", r"head.global_fc.\1"),
                Rule(rf"branches\.{_attentive}\.1\.reduction\.(.+)", r"head.reduction.\1"),
                *_looks(),
                Rule(rf"branches\.{_attentive}\.1\.sum_conv\.(.+)", r"head.merge.\1"),
                Rule(r"branches\.\d\.1\.classifiers?\..+", reason=_CLASSIFIER),
            ),
            has=(r"common_branch\.backbone1\.0\.weight$", rf"branches\.{_global}\.1\.fc\."),
            statistics=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            note=f"{_HEAD} {{NAME: ABDHead}}; tested with TEST.EVALUATOR.NORMALIZE false",
        )
    )
