"""The tensor names of the authors' checkpoints, which are those of CLIP-ReID."""

from __future__ import annotations

from reid.modeling.clip_formats import clip_rules
from reid.modeling.formats import Format, Rule, register_format

_NECK = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

register_format(
    Format(
        "pcl-clip",
        "PCL-CLIP and CLIP-ReID: CLIP's image encoder with two necks",
        (
            *clip_rules(r"image_encoder\.", "head.projection.weight"),
            Rule(
                "cv_embed",
                "backbone.camera_embed",
                change=lambda x: x[:, None] if x.ndim == 2 else x,
            ),
            Rule(rf"bottleneck\.{_NECK}", r"head.neck.\1"),
            Rule(rf"bottleneck_proj\.{_NECK}", r"head.projection_neck.\1"),
            Rule(r"classifier(?:_proj)?\..+", reason="classifier of the training identities"),
            Rule(r"(?:prompt_learner|text_encoder)\..+", reason="text encoder"),
        ),
        has=(r"image_encoder\.class_embedding$", r"bottleneck_proj\."),
        note="for MODEL.BACKBONE {NAME: CLIPViT} and MODEL.HEAD {NAME: TwoNeckHead}",
    )
)
