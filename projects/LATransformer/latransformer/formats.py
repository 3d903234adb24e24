"""The tensor names of the LA-Transformer authors' checkpoints."""

from __future__ import annotations

from reid.modeling.formats import Format, Rule, register_format

register_format(
    Format(
        "la-transformer",
        "the authors of LA-Transformer: timm's ViT and a classifier for each part",
        (
            Rule(
                r"model\.(cls_token|pos_embed|(?:patch_embed|blocks|norm)\..+)", r"backbone.net.\1"
            ),
            Rule(r"model\.(?:head|fc|pre_logits)\..+", reason="classifier of the pre-training"),
            Rule(r"classifier\d+\..+", reason="classifier of the training identities"),
        ),
        has=(r"model\.cls_token$", r"classifier0\.add_block\."),
        statistics=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        note="for MODEL.HEAD {NAME: LAHead}",
    )
)
