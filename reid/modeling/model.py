"""The network: a backbone and a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reid.modeling.domain_batchnorm import DomainSplit
from reid.structures import Batch, Embeddings, FeatureTokens


class ReIDModel(nn.Module):
    """Backbone -> tokens -> head -> embeddings.

    Args:
        backbone: Batch -> FeatureTokens; `embed_dim`, and `num_cameras` if it knows any.
        head: (FeatureTokens, Batch) -> Embeddings; `embed_dim` and `num_parts`. If it has `mirror`
            and that is true, it gets in eval mode the mean of the tokens of an image and of its
            mirror image: the raw features are averaged, before any normalisation.

    Attributes:
        embed_dim: D of the banks.
        num_parts: K, parts beside the whole image.
        num_cameras: Cameras that the backbone knows.
        domain_split: What its `DomainBatchNorm` layers share; None: it has none.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.embed_dim = int(head.embed_dim)  # type: ignore[arg-type]
        self.num_parts = int(head.num_parts)  # type: ignore[arg-type]
        self.num_cameras = int(getattr(backbone, "num_cameras", 0))
        self.domain_split: DomainSplit | None = None

    def forward(self, batch: Batch) -> Embeddings:
        """Embeddings of the batch's images."""
        if self.domain_split is not None and self.training:
            self.domain_split.see(batch)
        features: FeatureTokens = self.backbone(batch)
        if not self.training and getattr(self.head, "mirror", False):
            features = _with_mirror(features, self.backbone(batch.mirrored()))
        embeddings: Embeddings = self.head(features, batch)
        return embeddings

    def resize_tensor(self, name: str, tensor: Tensor) -> Tensor | None:
        """A tensor of another shape, resized to fit if the backbone can; else None."""
        resize = getattr(self.backbone, "resize_tensor", None)
        if resize is None or not name.startswith("backbone."):
            return None
        fitted: Tensor | None = resize(name.removeprefix("backbone."), tensor)
        return fitted


def _with_mirror(features: FeatureTokens, mirrored: FeatureTokens) -> FeatureTokens:
    """The mean of the tokens, each of the map with that of the same place of the body."""
    height, width = features.grid
    whole, places = mirrored.tokens[:, :1], mirrored.tokens[:, 1:]
    places = places.reshape(len(places), height, width, -1).flip(2).flatten(1, 2)
    tokens = (features.tokens + torch.cat((whole, places), 1)) / 2
    return FeatureTokens(tokens, features.grid)
