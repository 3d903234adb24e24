"""The names of CLIP's tensors: OpenAI's, which methods on CLIP use too, and timm's."""

from __future__ import annotations

from reid.modeling.formats import VIT_NAMES, Format, Rule, register_format


def clip_rules(start: str, projection: str = "backbone.net.head.weight") -> tuple[Rule, ...]:
    r"""Rules for the image encoder of CLIP under OpenAI's names, for `CLIPViT`.

    Args:
        start: Pattern of what stands before each name, such as `visual\.`.
        projection: Our name of the projection.
    """
    block, ours = rf"{start}transformer\.resblocks\.(\d+)\.", r"backbone.net.blocks.\1"
    kind = "(weight|bias)"
    return (
        Rule(rf"{start}conv1\.weight", "backbone.net.patch_embed.proj.weight"),
        Rule(f"{start}class_embedding", "backbone.net.cls_token", change=lambda x: x[None, None]),
        Rule(f"{start}positional_embedding", "backbone.net.pos_embed", change=lambda x: x[None]),
        Rule(rf"{start}ln_pre\.{kind}", r"backbone.net.norm_pre.\1"),
        Rule(rf"{start}ln_post\.{kind}", r"backbone.net.norm.\1"),
        Rule(rf"{block}ln_([12])\.{kind}", rf"{ours}.norm\2.\3"),
        Rule(rf"{block}attn\.in_proj_{kind}", rf"{ours}.attn.qkv.\2"),
        Rule(rf"{block}attn\.out_proj\.{kind}", rf"{ours}.attn.proj.\2"),
        Rule(rf"{block}mlp\.c_fc\.{kind}", rf"{ours}.mlp.fc1.\2"),
        Rule(rf"{block}mlp\.c_proj\.{kind}", rf"{ours}.mlp.fc2.\2"),
        Rule(f"{start}proj", projection, change=lambda x: x.mT if x.ndim == 2 else x),
    )


_CLIP = (
    "for MODEL.BACKBONE {NAME: CLIPViT}; only OpenAI's weights and others trained with QuickGELU"
    " fit its activation, which files do not tell"
)

register_format(
    Format(
        "clip",
        "CLIP, OpenAI's names: the image encoder alone or with the text encoder",
        (
            *clip_rules(r"(?:visual\.)"),
            Rule(
                r"(?:transformer|ln_final)\..+|token_embedding\.weight|positional_embedding"
                r"|text_projection|logit_scale|input_resolution|context_length|vocab_size",
                reason="text encoder",
            ),
        ),
        has=(r"visual\.class_embedding$", r"visual\.ln_pre\."),
        note=_CLIP,
    )
)
register_format(
    Format(
        "clip-timm",
        "CLIP's image encoder, timm's names",
        (
            Rule(r"norm_pre\.(weight|bias)", r"backbone.net.norm_pre.\1"),
            Rule(VIT_NAMES, r"backbone.net.\1"),
            Rule(r"head\.weight", "backbone.net.head.weight"),
            Rule(r"head\.bias", reason="CLIP's projection has none; it is 0"),
        ),
        has=(r"norm_pre\.weight$", r"cls_token$", r"blocks\.0\."),
        note=_CLIP,
    )
)
