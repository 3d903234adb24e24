"""The tensor names of IICS's checkpoints."""

from __future__ import annotations

from reid.modeling.formats import Format, Rule, register_format

_LAYER = r"(layer\d\.\d+)"

register_format(
    Format(
        "iics",
        "the authors of IICS: a ResNet-50 with AIBN",
        (
            Rule(rf"model\.{_LAYER}\.adaptive_weight", r"backbone.net.\1.adaptive_weight"),
            Rule(rf"model\.{_LAYER}\..+\.adaptive_weight", reason="its block has the same number"),
            Rule(r"model\.((?:conv1|bn1|layer\d)\..+)", r"backbone.net.\1"),
            Rule(r"classifier\..+", reason="classifiers of clusters"),
        ),
        has=(r"model\.layer3\.0\.adaptive_weight$",),
    )
)
