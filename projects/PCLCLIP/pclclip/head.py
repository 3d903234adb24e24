"""The head of PCL-CLIP: CLIP's two features, each with a neck, normalised together."""

from __future__ import annotations

import torch
from torch import nn

from reid.modeling.clip import CLIPViT
from reid.modeling.heads import Neck, normalize
from reid.registry import HEAD
from reid.structures import Batch, Embeddings, FeatureTokens


@HEAD.register()
class TwoNeckHead(nn.Module):
    """The class token t and its projection p = W t by CLIP, each with its own BatchNorm.

    The feature is [b1(t); b2(p)], of unit length as a whole, so the two halves weigh as the
    BatchNorms leave them (PCL-CLIP, in the authors' code). W comes from the backbone: load its
    weights first. `post`, which a classifier gets, is not normalised.

    Args:
        backbone: A CLIPViT with a projection.

    Attributes:
        embed_dim: Of t and p together.
        num_parts: K = 0.

    Raises:
        ValueError: The backbone is another one, or has no projection.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        if not isinstance(backbone, CLIPViT):
            raise ValueError(f"backbone: expected CLIPViT, got {type(backbone).__name__}")
        self.projection = backbone.split_projection()
        self.embed_dim = backbone.embed_dim + backbone.projection
        self.num_parts = 0
        self.neck = Neck(backbone.embed_dim)
        self.projection_neck = Neck(backbone.projection)

    def forward(self, features: FeatureTokens, batch: Batch) -> Embeddings:
        """One bank (B, 1, D + P)."""
        token = features.tokens[:, 0]
        projected = self.projection(token)
        pre = torch.cat((token.float(), projected.float()), 1)
        post = torch.cat((self.neck(token), self.projection_neck(projected)), 1)
        unit = normalize(post)
        return Embeddings(pre[:, None], post[:, None], unit[:, None], unit)
