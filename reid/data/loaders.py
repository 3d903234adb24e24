"""Loaders: images from disk, in batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from reid.data.cache import ImageCache
from reid.data.maps import FloatMap, Geometry, map_size, move_map
from reid.data.resize import Pixels
from reid.data.samplers import Draw, LabelledSampler
from reid.data.transforms import FloatImage, ImageTransform
from reid.structures import Batch, DataError, ImageRecord

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]

_SHOWN = 5  # paths in a message


class Loaded(NamedTuple):
    """The images that a reading process could read, and the errors of the others.

    Attributes:
        batch: The images.
        errors: A message for each image that could not be read.
    """

    batch: Batch
    errors: list[str]


class ImageDataset(Dataset[Loaded]):
    """A torch dataset that reads whole batches of images.

    Args:
        records: The images.
        transform: Makes the model's input.
        cache: Holds the images in memory; datasets with the same records, size and interpolation
            may share one.
        views: Make further inputs of the same images, of the same size: `Batch.views`. Maps are
            those of the first one.

    Raises:
        DataError: An image lacks a number that the first image has (`ImageRecord.extra`), or one of
            the transform's maps.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        transform: ImageTransform,
        cache: ImageCache | None = None,
        views: Sequence[ImageTransform] = (),
    ) -> None:
        self._records = records
        self._transform = transform
        self._cache = cache
        self._views = (transform, *views)
        self._columns = side_columns(records)
        for source in transform.maps:
            if source.side in self._columns:
                raise DataError(
                    f"{records[0].path}: has numbers of the name {source.side!r}, which a map of "
                    "INPUT.MAPS has too; leave out one of them"
                )
            source.check(records)
        self._draws = _Draws()

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, items: Sequence[Draw]) -> Loaded:
        """Images as a batch.

        The augmentation depends only on the `Draw`'s seed, so it is the same in any process.
        """
        size = self._transform.size
        views = [_empty(len(items), 3, *size) for _ in self._views]
        maps = [
            _empty(len(items), len(source.mirror), *map_size(size, source.stride))
            for source in self._transform.maps
        ]
        rows: list[int] = []
        sides: list[dict[str, float]] = []
        errors: list[str] = []
        for item in items:
            try:
                row = len(rows)
                side = self._augment(
                    item,
                    [images[row].numpy() for images in views],
                    [values[row].numpy() for values in maps],
                )
            except DataError as error:
                errors.append(str(error))
            else:
                rows.append(item.index)
                sides.append(side)
        records = [self._records[row] for row in rows]
        image, *others = (images[: len(rows)] for images in views)
        batch = Batch(
            image,
            torch.tensor([record.camid for record in records], dtype=torch.int64),
            torch.tensor([record.domain for record in records], dtype=torch.int64),
            torch.tensor(rows, dtype=torch.int64),
            {name: column[rows] for name, column in self._columns.items()}
            | {name: torch.tensor([side[name] for side in sides]) for name in (sides or [{}])[0]}
            | {
                source.side: values[: len(rows)]
                for source, values in zip(self._transform.maps, maps, strict=True)
            },
            tuple(others),
            {source.side: source.mirror for source in self._transform.maps},
        )
        return Loaded(batch, errors)

    def _augment(
        self, item: Draw, views: Sequence[FloatImage], maps: Sequence[FloatMap]
    ) -> dict[str, float]:
        """Writes an image's augmentations into `views`, and the maps of the first one into `maps`.

        Returns the numbers about the first one.
        """
        pixels = self._pixels(item.index)
        track: list[Geometry] | None = [] if maps else None
        sides = []
        for number, (view, transform) in enumerate(zip(views, self._views, strict=True)):
            rng = self._draws.seeded(item.seed, number)
            sides.append(transform.finish(pixels, view, rng, self._other(rng), track))
        record, size = self._records[item.index], self._transform.size
        for source, out in zip(self._transform.maps, maps, strict=True):
            out[:] = move_map(source.read(record), size, source, track or ())
        return sides[0]

    def _pixels(self, index: int) -> Pixels:
        path, read = self._records[index].path, self._transform.read
        return read(path) if self._cache is None else self._cache.pixels(index, path, read)

    def _other(self, rng: np.random.Generator) -> Callable[[], Pixels]:
        return lambda: self._pixels(int(rng.integers(len(self._records))))


class BatchLoader(DataLoader[Batch]):
    """Batches of images, with rules for unreadable ones.

    An unreadable image is never replaced by another one. With `stop` it ends the pass. With `skip`
    the batch is one image smaller, and at the end of a pass the log says how many were left out,
    with the first paths. But if a training batch loses more than half of its images, the pass ends:
    then the disk is at fault, not a single image.

    Args:
        dataset: The images.
        batches: Draws, batch by batch.
        on_error: What to do about an unreadable image.
        num_workers: Reading processes; 0: this one reads.
        pin_memory: Batches in page-locked memory, for a GPU.
        persistent: Whether the workers live on after a pass.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batches: Sampler[list[Draw]] | Sequence[list[Draw]],
        *,
        on_error: OnError = "stop",
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent: bool = False,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]  # it gives whole batches
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=_same,  # type: ignore[arg-type]
            pin_memory=pin_memory,
            persistent_workers=persistent and num_workers > 0,
            generator=torch.Generator(),
        )
        self._on_error = on_error
        self._in_training = isinstance(batches, LabelledSampler)

    def loaded(self) -> Iterator[Loaded]:
        """Batches of one pass with what failed in each, for those who tell of it themselves."""
        loaded: Iterator[Loaded] = super().__iter__()
        return loaded

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches of one pass.

        Raises:
            DataError: An image cannot be read, or with `skip` too many of a batch.
        """
        errors: list[str] = []
        count = 0
        for batch, failed in self.loaded():
            count += len(batch.index) + len(failed)
            if failed and self._on_error == "stop":
                raise DataError(failed[0])
            errors += failed
            if self._in_training and len(failed) > len(batch.index):
                raise DataError(
                    f"{len(failed)} of {len(failed) + len(batch.index)} images of a batch cannot "
                    f"be read, too many to skip; is the disk still there? {failed[0]}"
                )
            if len(batch.index):
                yield batch
        if errors:
            first = [*dict.fromkeys(errors)]
            logger.warning(
                "%s of %s images were skipped, since they cannot be read (%d different files):%s",
                f"{len(errors):,}",
                f"{count:,}",
                len(first),
                "".join(f"\n  {error}" for error in first[:_SHOWN])
                + ("\n  ..." if len(first) > _SHOWN else ""),
            )


def train_loader(
    records: Sequence[ImageRecord],
    transform: ImageTransform,
    sampler: LabelledSampler,
    *,
    cache: ImageCache | None = None,
    on_error: OnError = "stop",
    num_workers: int = 0,
    pin_memory: bool = False,
    views: Sequence[ImageTransform] = (),
) -> BatchLoader:
    """Batches as the sampler draws them; workers live on from epoch to epoch.

    Args:
        records: The images.
        transform: With augmentation.
        sampler: Which images come.
        cache: See `ImageDataset`.
        on_error: See `BatchLoader`.
        num_workers: Reading processes; the batches are the same for any number.
        pin_memory: See `BatchLoader`.
        views: See `ImageDataset`.
    """
    return BatchLoader(
        ImageDataset(records, transform, cache, views),
        sampler,
        on_error=on_error,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent=True,
    )


def eval_loader(
    records: Sequence[ImageRecord],
    transform: ImageTransform,
    *,
    batch_size: int,
    cache: ImageCache | None = None,
    on_error: OnError = "stop",
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    rows: Sequence[int] | None = None,
) -> BatchLoader:
    """Batches of this process's share of the images, in order.

    All shares have the same length: the last ones may repeat the first images, as `Batch.index`
    shows. Batches without a readable image are left out.

    Args:
        records: The images.
        transform: Without augmentation.
        batch_size: Images in a batch.
        cache: See `ImageDataset`.
        on_error: See `BatchLoader`.
        num_workers: Reading processes.
        rank: This process.
        world_size: All processes.
        rows: The records that are wanted; None: all.
    """
    wanted = range(len(records)) if rows is None else rows
    share = -(-len(wanted) // world_size)
    places = range(rank * share, (rank + 1) * share)
    draws = [Draw(wanted[place % len(wanted)], 0) for place in places]
    batches = [draws[start : start + batch_size] for start in range(0, share, batch_size)]
    return BatchLoader(
        ImageDataset(records, transform, cache),
        batches,
        on_error=on_error,
        num_workers=num_workers,
    )


class _Draws:
    """A counter-based generator; reseeding it takes a tenth of the time of making a new one."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._fresh = self._bits.state

    def seeded(self, seed: int, view: int = 0) -> np.random.Generator:
        """The generator, as if made new from `seed` (0 to 2^64 - 1) and `view`."""
        key = self._fresh["state"]["key"]
        key[0], key[1] = seed, view
        self._bits.state = self._fresh
        return self._generator


def _empty(*shape: int) -> Tensor:
    """An empty tensor; a worker takes memory shared with the main process."""
    images = torch.empty(0)
    if get_worker_info() is not None:
        # As torch's collate does: this saves a copy of every batch.
        images.set_(images.untyped_storage()._new_shared(4 * math.prod(shape)))  # type: ignore[no-untyped-call]
    return images.resize_(*shape)


def side_columns(records: Sequence[ImageRecord]) -> dict[str, Tensor]:
    """The numbers and arrays of the records, (N, ...) by name."""
    first = records[0].extra if records else {}
    names = [name for name, value in first.items() if not isinstance(value, str)]
    columns = {}
    for name in names:
        for record in records:
            if isinstance(record.extra.get(name, ""), str):
                raise DataError(f"{record.path}: has no number {name!r}, as {records[0].path} has")
        try:
            columns[name] = torch.from_numpy(np.stack([record.extra[name] for record in records]))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{name!r}: expected a number or an array of one shape for each image ({error})"
            ) from error
    return columns


def _same(loaded: Loaded) -> Loaded:
    return loaded
