"""CLIP's image encoder as a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from reid.modeling.vit import ViT, Width
from reid.modeling.weights import load_weights
from reid.registry import BACKBONE, Range

PRETRAINED = "vit_base_patch16_clip_quickgelu_224.openai"
"""timm's name of OpenAI's ViT-B/16. Its namesake without `quickgelu` has another activation."""


@BACKBONE.register()
class CLIPViT(ViT):
    """CLIP's image encoder, ViT-B/16 by default.

    Radford et al., *Learning Transferable Visual Models From Natural Language Supervision* (ICML
    2021). Unlike `ViT`, it has a LayerNorm before the layers, patches that are projected without
    bias, QuickGELU, u * sigmoid(1.702 u), as OpenAI's weights need it, and LayerNorms with an
    epsilon of 1e-5. It is timm's network of the name in `PRETRAINED`.

    The vector of a camera, if it is asked for, is added to the class token alone (Li et al.,
    *CLIP-ReID*, AAAI 2023); the vectors start as those of `ViT`.

    Args:
        image_size: (H, W) in pixels.
        embed_dim: D.
        num_heads: Attention heads.
        drop_path: Rate of stochastic depth at the last layer.
        projection: Length P of CLIP's projection of the class token, which a head may take over
            (`split_projection`); 0: none, for heads that do not.
        pretrained: Start from OpenAI's weights, which timm downloads once.
        **options: The other options of `ViT`.

    Attributes:
        projection: P.

    Raises:
        ValueError: As `ViT`; or the weights cannot be downloaded, or are of another size.
    """

    net_options: ClassVar[Mapping[str, Any]] = {
        "norm_layer": partial(nn.LayerNorm, eps=1e-5),
        "act_layer": "quick_gelu",
        "pre_norm": True,
    }
    fixed_options = ("stem", "stem_channels", "mlp_ratio", "num_views")

    def __init__(
        self,
        image_size: tuple[int, int],
        embed_dim: Width = 768,
        num_heads: int = 12,
        drop_path: float = 0.0,
        projection: Annotated[int, Range(0, 16_384)] = 512,
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            image_size, embed_dim=embed_dim, num_heads=num_heads, drop_path=drop_path, **options
        )
        if projection < 0:
            raise ValueError(f"projection: expected 0 or more, got {projection}")
        self.projection = projection
        if projection:
            self.net.head = nn.Linear(embed_dim, projection, bias=False)
            nn.init.normal_(self.net.head.weight, std=embed_dim**-0.5)
        if pretrained:
            self._load_pretrained()

    def split_projection(self) -> nn.Module:
        """Removes CLIP's projection (D -> P, no bias) and returns it, for a head that uses it.

        Raises:
            ValueError: There is none.
        """
        if not self.projection:
            raise ValueError("projection: the head needs CLIP's projection, got 0")
        layer: nn.Module = self.net.head
        self.net.head = nn.Identity()
        return layer

    def _add_side(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        return torch.cat((tokens[:, :1] + vectors, tokens[:, 1:]), 1)

    def _load_pretrained(self) -> None:
        """Takes OpenAI's weights, with the position embedding resized as `ViT` does."""
        try:
            # In its own image size, since timm would resize the position embedding in another way.
            source: Any = timm.create_model(PRETRAINED, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"pretrained: timm's weights of {PRETRAINED!r} cannot be downloaded ({error}); get "
                "them elsewhere and set MODEL.BACKBONE_WEIGHTS to the file"
            ) from error
        state = {f"net.{name}": tensor for name, tensor in source.state_dict().items()}
        load_weights(self, state, source=f"timm's {PRETRAINED}", allow_missing=("camera_embed",))
