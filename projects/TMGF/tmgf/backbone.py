"""IBN-ViT: the ViT with an IBN convolution stem and camera embeddings."""

from __future__ import annotations

from typing import Any

from reid.modeling.vit import ViT
from reid.registry import BACKBONE


@BACKBONE.register()
class IBNViT(ViT):
    """ViT with an IBN convolution stem, and a learned embedding of the camera on every token.

    TMGF, section 3.1, equation 1, with one vector for each camera, as in the authors' code.
    Attributes and errors are those of `ViT`.

    Args:
        image_size: (H, W) in pixels.
        **options: The other options of `ViT`.
    """

    fixed_options = ("stem", "camera_embedding")

    def __init__(self, image_size: tuple[int, int], **options: Any) -> None:
        super().__init__(image_size, stem="ibn", camera_embedding=True, **options)
