"""IBN-ViT: the ViT with an IBN convolution stem and camera embeddings, and a last layer to give."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from reid.modeling.vit import ViT
from reid.registry import BACKBONE


@BACKBONE.register()
class IBNViT(ViT):
    """ViT with an IBN convolution stem, and a learned embedding of the camera on every token.

    TMGF, section 3.1, equation 1, with one vector for each camera, as in the authors' code.
    Options, attributes and errors are those of `ViT`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        num_cameras: int = 0,
        unseen_cameras: Sequence[int] = (),
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        stem_channels: int = 64,
        drop_path: float = 0.1,
        camera_scale: float = 3.0,
    ) -> None:
        super().__init__(
            image_size,
            num_cameras,
            unseen_cameras,
            "ibn",
            stem_channels,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            patch_size,
            drop_path,
            camera_embedding=True,
            camera_scale=camera_scale,
        )

    def split_last_layer(self) -> tuple[nn.Module, nn.Module]:
        """Gives the last layer and the final norm away, to a head that takes them over."""
        block, norm = self.net.blocks[-1], self.net.norm
        self.net.blocks = self.net.blocks[:-1]
        self.net.norm = nn.Identity()
        return block, norm
