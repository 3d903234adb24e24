"""Sizes of all inputs: as on MSMT17 for a GPU, tiny for a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes that the sections use.

    Attributes:
        image: (H, W) of images for a transformer.
        image_conv: (H, W) of images for a convolutional network.
        dim: D of TMGF's ViT.
        depth: Layers of the ViT.
        short_depth: Layers of the ViT in comparisons, where each layer takes time to compile.
        heads: Attention heads of the ViT.
        stem: Channels of the ViT's stem.
        small_batch: Batch size of training.
        large_batch: Batch size that fills the device.
        test_batch: Batch size of extraction.
        cpu_batch: Batch size for comparisons with the CPU.
        steps: Steps whose losses are compared.
        many_steps: Steps after which memory may not have grown.
        rows: Rows of a memory, few and many.
        compared: Features whose neighbours are searched on both devices.
        clustered: Features that are clustered, few and many.
        ranked: Queries, gallery images, identities, cameras.
        product: Side of the large matrix product.
        copied_mb: MB that are copied for the bandwidth.
        files: JPEG files that are read.
        networks: timm's names of the other networks, with their images: `conv` or `vit`.
        osnet_width: Width of the OSNet among the other networks.
        seconds: Time to measure each speed.
    """

    image: tuple[int, int]
    image_conv: tuple[int, int]
    dim: int
    depth: int
    short_depth: int
    heads: int
    stem: int
    small_batch: int
    large_batch: int
    test_batch: int
    cpu_batch: int
    steps: int
    many_steps: int
    rows: tuple[int, int]
    compared: int
    clustered: tuple[int, int]
    ranked: tuple[int, int, int, int]
    product: int
    copied_mb: int
    files: int
    networks: tuple[tuple[str, str], ...]
    osnet_width: float
    seconds: float


FULL = Sizes(
    image=(384, 128),
    image_conv=(256, 128),
    dim=384,
    depth=12,
    short_depth=3,
    heads=6,
    stem=64,
    small_batch=32,
    large_batch=256,
    test_batch=256,
    cpu_batch=8,
    steps=20,
    many_steps=200,
    rows=(6_000, 30_000),
    compared=20_000,
    clustered=(32_621, 200_000),
    ranked=(11_659, 82_161, 3_060, 15),
    product=8192,
    copied_mb=1024,
    files=2048,
    networks=(("resnet50", "conv"), ("vit_base_patch16_224", "vit")),
    osnet_width=1.0,
    seconds=1.0,
)

TOY = Sizes(
    image=(48, 16),
    image_conv=(64, 32),
    dim=24,
    depth=3,
    short_depth=2,
    heads=3,
    stem=8,
    small_batch=8,
    large_batch=12,
    test_batch=8,
    cpu_batch=8,
    steps=4,
    many_steps=12,
    rows=(60, 120),
    compared=400,
    clustered=(300, 600),
    ranked=(40, 200, 10, 3),
    product=128,
    copied_mb=4,
    files=32,
    networks=(("test_resnet", "conv"), ("test_vit", "vit")),
    osnet_width=0.25,
    seconds=0.005,
)

TRAIN_IMAGES = 32_621
"""Training images of MSMT17."""

TEST_IMAGES = 11_659 + 82_161
"""Its query and gallery images."""

STEPS_PER_EPOCH = 200
"""Of TMGF's configs."""

EVALUATION_PERIOD = 10
"""Epochs between two evaluations in TMGF's configs."""
