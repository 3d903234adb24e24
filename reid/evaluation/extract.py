"""Features of a whole dataset, placed by index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid import distributed
from reid.structures import Batch, DataError, Embeddings, FeatureSet, ImageRecord, ProgressBar

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def extract_features(
    model: nn.Module,
    loader: Iterable[Batch],
    records: Sequence[ImageRecord],
    device: torch.device,
    progress: ProgressBar | None = None,
    *,
    flip: bool = False,
    allow_missing: bool = False,
    precision: Precision = "fp32",
) -> FeatureSet:
    """Features of `records` in their order, in eval mode and without gradients.

    With several processes, each passes a loader over its share; all get the whole set. Rows are
    placed by index, so an image that a share repeats as padding does no harm.

    Args:
        model: (image, camid) -> Embeddings; its mode is restored.
        loader: Batches whose `index` points into `records`.
        records: The N images.
        device: Where the model is and where the features stay.
        progress: Called with (images done, N).
        flip: Flip-test: features are the mean of those of the image and of its mirror image.
        allow_missing: Whether images may be in no batch, since they could not be read; their
            features are 0, which no other feature is; see `FeatureSet.readable`.
        precision: Of the network: in others than `fp32` products and convolutions are computed by
            `torch.autocast`. The features are float32 in any.

    Raises:
        DataError: None of the images could be read.
        FloatingPointError: A feature is not finite.
        ValueError: There is no image, an image was not in any batch, or the precision is unknown.
    """
    if not records:
        raise ValueError("records: expected one image or more, got none")
    if precision not in _DTYPES:
        raise ValueError(f"precision: expected one of {', '.join(_DTYPES)}, got {precision!r}")
    was_training = model.training
    model.eval()
    rows: list[Tensor] = []
    global_feats: list[Tensor] = []
    part_feats: list[Tensor] = []
    done = 0
    try:
        for batch in loader:
            moved = batch.to(device)
            global_feat, parts = _features(model, moved.image, moved.camid, precision)
            if flip:
                mirrored = _features(model, moved.image.flip(3), moved.camid, precision)
                global_feat = F.normalize(global_feat + mirrored[0], dim=-1)
                parts = F.normalize(parts + mirrored[1], dim=-1)
            rows.append(moved.index)
            global_feats.append(global_feat)
            part_feats.append(parts)
            done += len(moved.index) * distributed.world_size()
            if progress is not None:
                progress(min(done, len(records)), len(records))
    finally:
        model.train(was_training)
    if not rows:
        raise DataError(
            f"none of {len(records):,} images could be read, the first is {records[0].path}; is "
            "the disk still there? tools/check_data.py tells what is wrong with each"
        )
    index = distributed.gather_rows(torch.cat(rows))
    global_feat = _place(distributed.gather_rows(torch.cat(global_feats)), index, len(records))
    parts = _place(distributed.gather_rows(torch.cat(part_feats)), index, len(records))
    missing = len(records) - len(torch.unique(index))
    if missing and not allow_missing:
        raise ValueError(f"loader: {missing} of {len(records)} images were in no batch")
    finite = torch.isfinite(global_feat).all(1) & torch.isfinite(parts).all(2).all(1)
    if not bool(finite.all()):
        first = records[int((~finite).nonzero()[0])].path
        raise FloatingPointError(
            f"{int((~finite).sum())} of {len(records)} images have features that are not finite, "
            f"the first is {first}; the model's weights are broken or the image is"
            + (", or values are too large for fp16" if precision == "fp16" else "")
        )
    return FeatureSet(
        global_feat,
        parts,
        torch.tensor([record.pid for record in records], device=device),
        torch.tensor([record.camid for record in records], device=device),
    )


def _features(
    model: nn.Module, image: Tensor, camid: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Global (B, D) and part features (B, K, D), in float32.

    They are copies: CUDA graphs write the next batch's over those that the model gave.
    """
    dtype = _DTYPES[precision]
    with (
        torch.inference_mode(),
        torch.autocast(image.device.type, dtype, enabled=dtype is not torch.float32),
    ):
        embeddings: Embeddings = model(image, camid)
        return (
            embeddings.global_feat.to(torch.float32, copy=True),
            embeddings.part_feats.to(torch.float32, copy=True),
        )


def _place(values: Tensor, index: Tensor, count: int) -> Tensor:
    placed = values.new_zeros((count, *values.shape[1:]))
    placed[index] = values
    return placed
