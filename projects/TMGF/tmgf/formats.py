"""The tensor names of the TMGF authors' checkpoints."""

from __future__ import annotations

from reid.modeling.formats import Format, Rule, register_format

_NECK = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_PARTS = (
    Rule(r"base\.sie_embed", "backbone.camera_embed"),
    Rule(r"base\.(cls_token|pos_embed|(?:patch_embed|blocks)\..+)", r"backbone.net.\1"),
    Rule(rf"bottleneck\.{_NECK}", r"head.neck.\1"),
    Rule(rf"part_bns\.(\d+)\.{_NECK}", r"head.part_necks.\1.\2"),
)

# One branch, or two that share the last layer: the head uses the backbone's last layer.
register_format(
    Format(
        "tmgf-one-branch",
        "the authors of TMGF: a model whose last layer is not copied",
        (
            Rule(r"base\.blocks\.<last>\.(.+)", r"head.branches.0.0.\1"),
            Rule(r"base\.norm\.(.+)", r"head.branches.0.1.\1"),
            *_PARTS,
        ),
        has=(r"base\.cls_token$", r"part_bns\."),
        lacks=(r"b1\.",),
    )
)
register_format(
    Format(
        "tmgf",
        "the authors of TMGF: two branches with a last layer each",
        (
            Rule(r"base\.(?:blocks\.<last>|norm)\..+", reason="the branches' copies replace it"),
            Rule(r"b1\.(.+)", r"head.branches.0.\1"),
            Rule(r"b2\.(.+)", r"head.branches.1.\1"),
            *_PARTS,
        ),
        has=(r"base\.cls_token$", r"part_bns\.", r"b1\.", r"b2\."),
    )
)
