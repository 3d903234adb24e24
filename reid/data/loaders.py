"""Loaders: images from disk, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from reid.data.samplers import Draw, LabelledSampler
from reid.data.transforms import Transform
from reid.structures import Batch, DataError, ImageRecord


class ImageDataset(Dataset[Batch]):
    """Records and how their pictures become tensors.

    Args:
        records: The images.
        transform: RGB picture -> (3, H, W). Its randomness must come from torch's generator.
    """

    def __init__(self, records: Sequence[ImageRecord], transform: Transform) -> None:
        self._records = records
        self._transform = transform

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, item: int | Draw) -> Batch:
        """One image, with numbers that the loader collates into tensors.

        A `Draw` brings the seed of its augmentation, so that it comes out the same in any process
        and leaves no trace in torch's generator.

        Raises:
            DataError: The file is not a readable image.
        """
        index = item.index if isinstance(item, Draw) else item
        record = self._records[index]
        picture = _read(record.path)
        if isinstance(item, Draw):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(item.seed)
                image = self._transform(picture)
        else:
            image = self._transform(picture)
        return Batch(image, record.pid, record.camid, index)  # type: ignore[arg-type]


def train_loader(
    records: Sequence[ImageRecord],
    transform: Transform,
    sampler: LabelledSampler,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Batches as the sampler draws them; workers live on from epoch to epoch."""
    return DataLoader(
        ImageDataset(records, transform),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),
    )


def eval_loader(
    records: Sequence[ImageRecord],
    transform: Transform,
    *,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """This process's share of the images, in order.

    Shares are of equal length, so that every process has one: the last ones may repeat the first
    images, which `Batch.index` tells.
    """
    share = -(-len(records) // world_size)
    rows = [row % len(records) for row in range(rank * share, (rank + 1) * share)]
    batches = [rows[start : start + batch_size] for start in range(0, share, batch_size)]
    return DataLoader(
        ImageDataset(records, transform),
        batch_sampler=batches,
        num_workers=num_workers,
        generator=torch.Generator(),
    )


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            picture: Image.Image = image.convert("RGB")
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: is not a readable image ({error})") from error
