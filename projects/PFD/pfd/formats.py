"""The tensor names of the PFD authors' checkpoints."""

from __future__ import annotations

from reid.modeling.formats import VIT_NAMES, Format, Rule, register_format

_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_LAST = "<last>"
_LAYER = r"transformerdecoder\.layers\.(\d+)\."
_PFD = "part of PFDHead"

register_format(
    Format(
        "pfd",
        "the authors of PFD: a ViT, a decoder of views and their necks",
        (
            Rule(rf"base_vit\.(?:blocks\.{_LAST}|norm)\..+", reason="the parts' copy replaces it"),
            Rule(rf"base_vit\.{VIT_NAMES}", r"backbone.net.\1"),
            Rule(r"base_vit\.sie_embed", "backbone.camera_embed"),
            Rule(r"base_vit\.(?:fc|head)\..+", reason="classifier of the pre-training"),
            Rule(r"b2\.([01]\..+)", r"head.local.\1", _PFD),
            Rule(rf"bottleneck\.{_NORM}", r"head.neck.\1"),
            Rule(rf"bottleneck_decoder\.{_NORM}", r"head.visible_neck.\1", _PFD),
            Rule(rf"non_skt_decoder\.{_NORM}", r"head.hidden_neck.\1", _PFD),
            *(
                Rule(rf"{theirs}_{i + 1}\.{_NORM}", rf"head.{ours}.{i}.\1", _PFD)
                for theirs, ours in (
                    ("bottleneck", "part_necks"), ("bottleneck_decoder", "slot_necks")
                )
                for i in range(17)
            ),
            Rule(r"pose_decoder_linear\.(weight|bias)", r"head.pose_projection.\1", _PFD),
            Rule("query_embed", "head.decoder.queries", _PFD),
            Rule(rf"{_LAYER}multihead_attn\.(.+)", r"head.decoder.layers.\1.cross_attn.\2", _PFD),
            Rule(rf"{_LAYER}(.+)", r"head.decoder.layers.\1.\2", _PFD),
            Rule(r"transformerdecoder\.norm\.(weight|bias)", r"head.decoder.norm.\1", _PFD),
            Rule(r"decoder_norm\..+", reason="the same numbers as the decoder's last norm"),
            Rule(r"transformerdecoderlayer\..+", reason="the model of the decoder's layers"),
            Rule(r"classifier(?:_\d+|_encoder|_decoder(?:_\d+)?)?\..+",
                 reason="classifier of the training identities"),
        ),
        has=(r"base_vit\.cls_token$", r"pose_decoder_linear\."),
        statistics=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        note="for MODEL.HEAD {NAME: PFDHead} of PLUGINS [pfd]; the pose network's weights are not"
        " taken",
    )
)  # fmt: skip
