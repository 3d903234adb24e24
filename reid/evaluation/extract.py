"""Extracts the features of a whole set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid import distributed
from reid.shipped import tool
from reid.structures import (
    Batch,
    DataError,
    Embeddings,
    FeatureSet,
    ImageRecord,
    ProgressBar,
    finite_rows,
)

T = TypeVar("T")

Precision = Literal["fp32", "bf16", "fp16"]
Raw = Literal["none", "global", "all"]
"""The features before the necks that are wanted: none, the whole image's, or all banks joined."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ImageSet:
    """Images to extract features from, and how.

    Attributes:
        name: Name of the set, for messages.
        records: The N images.
        loader: Batches whose `index` points into `records`; with several processes, only this
            process's share.
        flip: Average the features of an image and of its mirror image.
        allow_missing: Whether the loader may leave out images that cannot be read; their features
            are 0, and `FeatureSet.present` says so.
        precision: Precision of the network; see `extract_features`.
        raw: What `FeatureSet.raw` is to hold.
        rows: The records that the loader gives; the others are not `present`. None: all.
    """

    name: str
    records: Sequence[ImageRecord]
    loader: Iterable[Batch]
    flip: bool = False
    allow_missing: bool = False
    precision: Precision = "fp32"
    raw: Raw = "none"
    rows: Sequence[int] | None = None

    def features(
        self, model: nn.Module, device: torch.device, progress: ProgressBar | None = None
    ) -> FeatureSet:
        """The model's features of the images; see `extract_features`."""
        return extract_features(
            model,
            self.loader,
            self.records,
            device,
            progress,
            flip=self.flip,
            allow_missing=self.allow_missing,
            precision=self.precision,
            raw=self.raw,
            rows=self.rows,
        )


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
    raw: Raw = "none",
    rows: Sequence[int] | None = None,
) -> FeatureSet:
    """Features of `records` in their order, in eval mode and without gradients.

    With several processes, each passes a loader over its share. All processes get the features of
    the whole set, or all raise an error if one fails. Rows are placed by index, so a share may
    repeat images as padding.

    Args:
        model: Batch -> Embeddings; its mode is restored.
        loader: Batches whose `index` points into `records`.
        records: The N images.
        device: The device of the model and of the result.
        progress: Called with (images done, N).
        flip: Average the features of an image and of its mirror image.
        allow_missing: Whether unreadable images may be missing in the batches; their features are
            then 0, and they are not `present`.
        precision: Precision of the network: with `bf16` and `fp16`, `torch.autocast` computes
            products and convolutions in it. The features are always float32.
        raw: What `FeatureSet.raw` is to hold; `all` takes as much memory as the banks.
        rows: The records that all loaders together give; the features of the others are 0, and
            they are not `present`. None: all.

    Raises:
        DataError: No image could be read, on this or another process.
        FloatingPointError: A feature is not finite.
        ValueError: There is no image, an image is missing in the batches, or the precision is
            unknown.
        RuntimeError: Another process failed for another reason.
    """
    if not records:
        raise ValueError("records: expected one image or more, got none")
    if precision not in _DTYPES:
        raise ValueError(f"precision: expected one of {', '.join(_DTYPES)}, got {precision!r}")
    wanted = records if rows is None else [records[row] for row in rows]
    share = partial(_extract_share, model, loader, wanted, device, progress, flip, precision, raw)
    places, tests, units, raws = _together(share)
    index = distributed.gather_rows(torch.cat(places))
    # Each bank is contiguous in memory.
    unit = _place(units, index, len(records), dim=1).transpose(0, 1)
    present = torch.zeros(len(records), dtype=torch.bool, device=device)
    present[index] = True
    test_feature = _place(tests, index, len(records), dim=0) if tests else unit[:, 0]
    raw_feature = _place(raws, index, len(records), dim=0) if raws else None
    features = features_of(records, test_feature, unit, present, raw_feature)
    _check(features, records, len(wanted), allow_missing, precision)
    return features


def features_of(
    records: Sequence[ImageRecord],
    test: Tensor,
    unit: Tensor,
    present: Tensor,
    raw: Tensor | None = None,
) -> FeatureSet:
    """Features of `records` with what the records know; see `FeatureSet` for the shapes."""
    pids, camids, domains, frames = (
        torch.tensor([getattr(record, name) for record in records], device=test.device)
        for name in ("pid", "camid", "domain", "frame")
    )
    return FeatureSet(test, unit, pids, camids, domains, frames, present, raw)


def _extract_share(
    model: nn.Module,
    loader: Iterable[Batch],
    records: Sequence[ImageRecord],
    device: torch.device,
    progress: ProgressBar | None,
    flip: bool,
    precision: Precision,
    raw: Raw,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Indices, test features, banks and raw features of this process's batches.

    There are no test features if they equal the first bank, and no raw ones if `raw` is `none`.
    """
    rows: list[Tensor] = []
    tests: list[Tensor] = []
    units: list[Tensor] = []
    raws: list[Tensor] = []
    done = 0
    was_training = model.training
    model.eval()
    try:
        for batch in loader:
            moved = batch.to(device)
            test, unit, pre = _embed(model, moved, precision, flip, raw)
            rows.append(moved.index)
            units.append(unit)
            if pre is not None:
                raws.append(pre)
            if test is not None:
                tests.append(test)
            done += len(moved.index) * distributed.world_size()
            if progress is not None:
                progress(min(done, len(records)), len(records))
    finally:
        model.train(was_training)
    if not rows:
        raise DataError(
            f"none of {len(records):,} images could be read, the first is {records[0].path}; is "
            f"the disk still connected? {tool('check_data')} names the fault of each image"
        )
    return rows, tests, units, raws


def _together(work: Callable[[], T]) -> T:
    """Runs `work` on this process; if any process fails, all raise an error.

    Otherwise the other processes would wait forever.
    """
    failed: Exception | None = None
    try:
        done = work()
    except Exception as error:
        if not distributed.is_distributed():
            raise
        failed = error
    _raise_together(failed)
    return done


def _raise_together(failed: Exception | None) -> None:
    """Raises an error on every process if one has failed, so that no process waits forever."""
    if not any(distributed.largest(failed is not None)):
        return
    kind = "" if failed is None else type(failed).__name__
    told = distributed.gather_objects((kind, isinstance(failed, DataError), str(failed)))
    if failed is not None:
        raise failed
    for process, (name, is_data_error, text) in enumerate(told):
        if is_data_error:
            raise DataError(text)
        if name:
            raise RuntimeError(f"process {process} failed: {name}: {text}")


def _check(
    features: FeatureSet,
    records: Sequence[ImageRecord],
    count: int,
    allow_missing: bool,
    precision: Precision,
) -> None:
    """Raises an error if images of the `count` wanted are missing or features are not finite."""
    missing = count - int(features.present.sum())
    if missing and not allow_missing:
        raise ValueError(f"loader: {missing} of {count} images were in no batch")
    finite = finite_rows(features.test) & finite_rows(features.unit)
    if not bool(finite.all()):
        first = records[int((~finite).nonzero()[0])].path
        raise FloatingPointError(
            f"{int((~finite).sum())} of {len(records)} images have features that are not finite, "
            f"the first is {first}; the model's weights or the image are broken"
            + (", or values are too large for fp16" if precision == "fp16" else "")
        )


def embed_batch(
    model: nn.Module, batch: Batch, precision: Precision = "fp32", *, flip: bool = False
) -> Tensor:
    """Test features (B, D) of a batch, as `extract_features` gives them, in inference mode.

    Args:
        model: In eval mode, on the batch's device.
        batch: B images.
        precision: See `extract_features`.
        flip: See `extract_features`.
    """
    test, unit, _ = _embed(model, batch, precision, flip)
    return unit[0] if test is None else test


def _embed(
    model: nn.Module, batch: Batch, precision: Precision, flip: bool, raw: Raw = "none"
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The results of `_features`; with `flip`, their mean with those of the mirror images."""
    test, unit, pre = _features(model, batch, precision, raw)
    if flip:
        other_test, other_unit, other_pre = _features(model, batch.mirrored(), precision, raw)
        unit = F.normalize(unit + other_unit, dim=-1)
        if test is not None and other_test is not None:
            test = F.normalize(test + other_test, dim=-1)
        if pre is not None and other_pre is not None:
            pre = (pre + other_pre) / 2
    return test, unit, pre


def _features(
    model: nn.Module, batch: Batch, precision: Precision, raw: Raw
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Test features (B, D'), banks (1 + K, B, D) and raw features (B, D), in float32.

    Test features are None if they equal the first bank; raw ones if `raw` is `none`. The
    results are copies, since a CUDA graph overwrites the model's outputs in the next call.
    """
    dtype = _DTYPES[precision]
    with (
        torch.inference_mode(),
        torch.autocast(batch.image.device.type, dtype, enabled=dtype is not torch.float32),
    ):
        embeddings: Embeddings = model(batch)
        test, unit = embeddings.test, embeddings.unit
        first = unit[:, 0]
        pre = embeddings.pre if raw == "all" else embeddings.pre[:, :1]
        same = (
            test.data_ptr() == first.data_ptr()
            and test.shape == first.shape
            and test.stride() == first.stride()
        )
        return (
            None if same else test.to(torch.float32, copy=True),
            unit.transpose(0, 1).to(
                torch.float32, copy=True, memory_format=torch.contiguous_format
            ),
            None if raw == "none" else pre.flatten(1).to(torch.float32, copy=True),
        )


def _place(values: Sequence[Tensor], index: Tensor, count: int, dim: int) -> Tensor:
    """The rows of all processes' batches, put at their indices among `count` along `dim`."""
    rows = torch.cat([value.movedim(dim, 0) for value in values])
    gathered = distributed.gather_rows(rows).movedim(0, dim)
    shape = list(gathered.shape)
    shape[dim] = count
    placed = gathered.new_zeros(shape)
    placed.index_copy_(dim, index, gathered)
    return placed
