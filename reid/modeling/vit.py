"""timm's VisionTransformer with a choice of stems, and embeddings of camera and viewpoint.

`ViT` takes 15 arguments: twelve options, each a key of the config, and three facts about the data.
Grouping them in a type would add a level to every config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.ibn import IBN
from reid.modeling.side_vectors import check_views, embed_side, start_side_vectors
from reid.registry import BACKBONE, Range
from reid.structures import VIEW, Batch, FeatureTokens, ImageRecord

Width: TypeAlias = Annotated[int, Range(1, 16_384)]


class IBNStem(nn.Module):
    """Three convolutions and a patch projection, in place of timm's PatchEmbed.

    Luo et al., *Self-Supervised Pre-Training for Transformer-Based Person Re-Identification*
    (2021), figure 2. The first convolution halves the resolution, so a patch of P pixels is
    P / 2 pixels wide in its output.

    Args:
        img_size: (H, W) in pixels.
        patch_size: P in pixels.
        in_chans: Channels of the image.
        embed_dim: D.
        bias: Of the projection.
        channels: Of the convolutions.
        **_: Further arguments that timm passes to a patch embedding; the stem ignores them.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int = 384,
        bias: bool = True,
        channels: int = 64,
        **_: object,
    ) -> None:
        super().__init__()
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False),
            IBN(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            IBN(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        half = patch_size // 2
        self.proj = nn.Conv2d(channels, embed_dim, half, stride=half, bias=bias)
        for module in self.conv:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h * w, D)."""
        # On a CPU channels last take a fifth less time, but a third more with gradients.
        if image.device.type != "cpu" or not torch.is_grad_enabled():
            image = image.contiguous(memory_format=torch.channels_last)
        patches: Tensor = self.proj(self.conv(image))
        return patches.flatten(2).transpose(1, 2)


class OverlappingPatches(nn.Module):
    """One projection of patches that overlap (He et al., *TransReID*, ICCV 2021, equation 2).

    There is no padding: pixels at the right and the bottom that fill no patch are not seen. The
    module has the parameters of timm's PatchEmbed.

    Args:
        img_size: (H, W) in pixels.
        patch_size: P in pixels.
        in_chans: Channels of the image.
        embed_dim: D.
        bias: Of the projection.
        stride: S, pixels from one patch to the next.
        **_: Further arguments that timm passes to a patch embedding.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int = 384,
        bias: bool = True,
        stride: int = 12,
        **_: object,
    ) -> None:
        super().__init__()
        self.grid_size = patch_grid(img_size, patch_size, stride)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h * w, D)."""
        patches: Tensor = self.proj(image)
        return patches.flatten(2).transpose(1, 2)


def patch_grid(image_size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """(h, w) of the patches of an image: floor((H - P) / S) + 1 rows, and columns likewise."""
    height, width = image_size
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


@BACKBONE.register()
class ViT(nn.Module):
    """ViT as person re-identification uses it: patches that may overlap, or convolutions; cameras.

    Dosovitskiy et al., *An Image is Worth 16x16 Words* (ICLR 2021), without registers; the
    class token is the token of the whole image. The embedding of side information (SIE) is one
    learned vector for each camera, for each viewpoint, or for each pair of them, added to every
    token with the position embedding: He et al., *TransReID* (ICCV 2021), section 3.3, equation 4.
    An image of a camera that training has not seen, or of an unknown camera (-1), gets the mean of
    the learned vectors of all cameras (from its viewpoint); one of an unknown viewpoint, the mean
    over the viewpoints. The viewpoint comes from the data set, as `Batch.side["view"]`.

    ViT-S/16 is the default; ViT-B/16 has `embed_dim` 768 and 12 heads. There are more than ten
    arguments because each is an option of the config, where a nested type would only add a level.

    Args:
        image_size: (H, W) in pixels.
        num_cameras: Cameras of the training data, the largest id + 1.
        unseen_cameras: Camera ids below `num_cameras` that no training image has.
        stem: `patches`, one projection of each patch, or `ibn`, convolutions (see `IBNStem`).
        stem_channels: Of the convolutions of `ibn`; even.
        embed_dim: D.
        depth: Transformer layers.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLPs in D.
        patch_size: Pixels; even with the stem `ibn`.
        patch_stride: Pixels from one patch to the next; fewer than `patch_size` makes patches
            overlap, with the stem `patches` alone. None: `patch_size`.
        drop_path: Rate of stochastic depth at the last layer, growing linearly from 0.
        camera_embedding: Learn a vector for each camera; none if the data have no cameras.
        camera_scale: Factor of the embeddings of cameras and viewpoints (lambda).
        num_views: Viewpoints of the data set, numbered from 0; 0: no vectors for viewpoints.

    Attributes:
        embed_dim: D.
        image_size: (H, W) in pixels.
        grid: (h, w) of the tokens.
        num_cameras: Cameras that have an embedding; 0 without `camera_embedding`.
        trained_size: (H, W) of the images that the weights to load were trained with; None: the
            grid of their position embedding is guessed.
        camera_embed: The vectors (cameras, viewpoints, D), with 1 for what has no vectors of its
            own; None: there are no vectors.
        dataset_specific: Names of weights that belong to one data set's cameras; they are not
            taken from pre-trained weights.
        net_options: What else timm's VisionTransformer is given.

    Raises:
        ValueError: A number is out of its range, or sizes do not fit each other.
    """

    net_options: ClassVar[Mapping[str, Any]] = {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    dataset_specific = ("camera_embed",)
    trained_size: tuple[int, int] | None = None

    def __init__(
        self,
        image_size: tuple[int, int],
        num_cameras: int = 0,
        unseen_cameras: Sequence[int] = (),
        stem: Literal["patches", "ibn"] = "patches",
        stem_channels: Width = 64,
        embed_dim: Width = 384,
        depth: Annotated[int, Range(1, 1000)] = 12,
        num_heads: int = 6,
        mlp_ratio: Annotated[float, Range(0, 100, above=True)] = 4.0,
        patch_size: Annotated[int, Range(1, 4096)] = 16,
        drop_path: float = 0.1,
        camera_embedding: bool = False,
        camera_scale: float = 3.0,
        patch_stride: Annotated[int, Range(1, 4096)] | None = None,
        num_views: Annotated[int, Range(0, 1000)] = 0,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads: expected 1 or more, got {num_heads}")
        for name, value, step in (
            ("patch_size", patch_size, 2 if stem == "ibn" else 1),
            ("stem_channels", stem_channels, 2),
            ("embed_dim", embed_dim, num_heads),
            ("depth", depth, 1),
        ):
            if value < step or value % step:
                raise ValueError(f"{name}: expected a multiple of {step}, got {value}")
        stride = patch_size if patch_stride is None else patch_stride
        _check_patches(image_size, patch_size, stride, stem)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected 0 <= drop_path < 1, got {drop_path}")
        self.embed_dim = embed_dim
        self.num_cameras = num_cameras if camera_embedding else 0
        self.num_views = num_views
        self.grid = patch_grid(image_size, patch_size, stride)
        self.image_size = image_size
        self._patch_size, self._stride = patch_size, stride
        self._camera_scale = camera_scale
        embed_layer: Any = PatchEmbed
        if stem == "ibn":
            embed_layer = partial(IBNStem, channels=stem_channels)
        elif stride != patch_size:
            embed_layer = partial(OverlappingPatches, stride=stride)
        self.net: Any = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path,
            embed_layer=embed_layer,
            **self.net_options,
        )
        nn.init.trunc_normal_(self.net.get_parameter("cls_token"), std=0.02)
        self.camera_embed: nn.Parameter | None = None
        if self.num_cameras or num_views:
            unseen = unseen_cameras if self.num_cameras else ()
            self.camera_embed = nn.Parameter(
                start_side_vectors(self.num_cameras, num_views, embed_dim, unseen)
            )

    def forward(self, batch: Batch) -> FeatureTokens:
        """Tokens of the batch's images.

        Raises:
            ValueError: The images do not have the network's image size, or in training no
                viewpoints.
        """
        size = tuple(batch.image.shape[2:])
        if size != self.image_size:
            raise ValueError(f"expected images of {self.image_size}, got {size}")
        patches = self.net.patch_embed(batch.image)
        first = self.net.cls_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat((first, patches), 1) + self.net.pos_embed
        if self.camera_embed is not None:
            vectors = embed_side(
                self.camera_embed, batch.camid if self.num_cameras else None, self._views_of(batch)
            )
            tokens = self._add_side(tokens, self._camera_scale * vectors[:, None])
        tokens = self.net.norm_pre(tokens)
        before = None
        for block in self.net.blocks:
            before, tokens = tokens, block(tokens)
        return FeatureTokens(self.net.norm(tokens), self.grid, before)

    def _add_side(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        """Tokens (B, 1 + h*w, D) and vectors (B, 1, D) of side information."""
        return tokens + vectors

    def _views_of(self, batch: Batch) -> Tensor | None:
        """The viewpoints (B,); None: the network has no vectors for them."""
        if not self.num_views:
            return None
        if VIEW not in batch.side and self.training:
            raise ValueError(f"expected a viewpoint for each image as side {VIEW!r}, got none")
        return batch.side.get(VIEW, torch.full_like(batch.camid, -1))

    def split_last_layer(self) -> tuple[nn.Module, nn.Module]:
        """Removes the last layer and the final norm and returns them, for a head that uses them."""
        block, norm = self.net.blocks[-1], self.net.norm
        self.net.blocks = self.net.blocks[:-1]
        self.net.norm = nn.Identity()
        return block, norm

    def resize_tensor(self, name: str, tensor: Tensor) -> Tensor | None:
        """A position embedding of another grid, resized to this one.

        Vectors (cameras x viewpoints, 1, D) of the authors' files get our shape.
        """
        if name == "camera_embed" and self.num_views and tensor.ndim == 3:
            fits = tensor.shape[1] == 1 and len(tensor) % self.num_views == 0
            return tensor.reshape(-1, self.num_views, tensor.shape[2]) if fits else None
        if name != "net.pos_embed":
            return None
        source = None
        if self.trained_size is not None:
            # The file does not tell its stride: it is ours, or its patches do not overlap.
            grids = [
                patch_grid(self.trained_size, self._patch_size, stride)
                for stride in (self._stride, self._patch_size)
            ]
            source = next((g for g in grids if g[0] * g[1] == tensor.shape[1] - 1), grids[-1])
        return resize_position_embedding(tensor, self.grid, source)

    @staticmethod
    def count_cameras(state: Mapping[str, Tensor], num_views: int = 0) -> int:
        """The number of cameras in a checkpoint; 0 = it has no camera embedding.

        Args:
            state: Tensors by name.
            num_views: The option; files of the authors have a row for each camera and viewpoint.
        """
        for name, tensor in state.items():
            if name.rpartition(".")[2] == "camera_embed" and tensor.ndim == 3 and tensor.numel():
                return len(tensor) * tensor.shape[1] // max(1, num_views)
        return 0

    def check_images(self, records: Sequence[ImageRecord]) -> None:
        """Checks that the training images have the viewpoints that the network needs.

        Raises:
            DataError: An image has no viewpoint, or one beyond `num_views`.
        """
        if self.num_views:
            check_views(records, self.num_views)


def _check_patches(
    image_size: tuple[int, int], patch_size: int, stride: int, stem: Literal["patches", "ibn"]
) -> None:
    """Checks that patches of this size and stride fit the image and the stem.

    Raises:
        ValueError: They do not.
    """
    if not 1 <= stride <= patch_size:
        raise ValueError(f"patch_stride: expected 1 to patch_size {patch_size}, got {stride}")
    if stride != patch_size:
        if stem == "ibn":
            raise ValueError(
                f"patch_stride: expected patch_size {patch_size} or null with the stem ibn, got "
                f"{stride}; only the stem patches has overlapping ones"
            )
        if min(image_size) < patch_size:
            raise ValueError(
                f"input.size: expected at least the patch size {patch_size}, got {list(image_size)}"
            )
    elif min(image_size) < patch_size or any(side % patch_size for side in image_size):
        nearest = [max(1, round(side / patch_size)) * patch_size for side in image_size]
        raise ValueError(
            f"input.size: expected multiples of the patch size {patch_size}, got "
            f"{list(image_size)}; the nearest is {nearest}"
        )


def resize_position_embedding(
    embedding: Tensor, grid: tuple[int, int], source_grid: tuple[int, int] | None = None
) -> Tensor:
    """Position embeddings for another grid, bilinear (align_corners false, no antialias).

    Args:
        embedding: (1, 1 + n, D), the class token's first.
        grid: (h, w) of the result.
        source_grid: (h, w) with h * w = n. None: the grid that is two times as high as wide, as in
            LUPerson checkpoints, or three times as high, or square; n fits at most one of these.

    Returns:
        (1, 1 + h * w, D).

    Raises:
        ValueError: The n tokens do not make the source grid.
    """
    if embedding.ndim != 3 or embedding.shape[0] != 1:
        raise ValueError(
            f"expected a position embedding (1, 1 + n, D), got {tuple(embedding.shape)}"
        )
    count = embedding.shape[1] - 1
    if source_grid is None:
        widths = [(aspect, math.isqrt(count // aspect)) for aspect in (2, 3, 1)]
        fitting = [(aspect * w, w) for aspect, w in widths if aspect * w * w == count]
        source_grid = fitting[0] if fitting else (0, 0)
    if source_grid[0] * source_grid[1] != count or not count:
        raise ValueError(f"a position embedding of {count} tokens is no grid of 2:1, 3:1 or 1:1")
    first, patches = embedding[:, :1], embedding[:, 1:]
    square = patches.transpose(1, 2).reshape(1, -1, *source_grid)
    resized = F.interpolate(square.float(), size=grid, mode="bilinear", align_corners=False)
    return torch.cat((first, resized.flatten(2).transpose(1, 2).to(embedding.dtype)), 1)
