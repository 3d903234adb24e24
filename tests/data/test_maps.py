"""Maps that are read beside an image go where the image goes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reid.data.augmentation import PadCrop, RandomErasing, RandomFlip
from reid.data.loaders import eval_loader, train_loader
from reid.data.maps import Crop, FloatMap, ImageMap, Move, map_size, move_map
from reid.data.resize import resize, resize_matrix
from reid.data.resized_crop import RandomResizedCrop
from reid.data.samplers import PKSampler
from reid.data.transforms import ImageTransform, PixelTransform
from reid.structures import Batch, DataError, ImageRecord, PseudoLabels

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Channels(ImageMap):
    """The picture's own channels; the mirror image exchanges green and blue."""

    side = "colours"
    mirror = (0, 2, 1)

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    def check(self, records: Sequence[ImageRecord]) -> None:
        missing = [record.path for record in records if "none" in record.path]
        if missing:
            raise DataError(f"{missing[0]}: has no colours")

    def read(self, record: ImageRecord) -> FloatMap:
        pixels = np.asarray(Image.open(record.path), np.float32) / 255
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(8):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(path)
        found.append(ImageRecord(str(path), i // 4, i % 2))
    return found


def train_batches(
    records: list[ImageRecord], transform: ImageTransform, num_workers: int = 0
) -> list[Batch]:
    sampler = PKSampler(4, images_per_identity=2, steps_per_epoch=3)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(8) // 4))
    return list(train_loader(records, transform, sampler, num_workers=num_workers))


def places(batch: Batch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The image's and the map's values in [0, 1]."""
    return (batch.image[row] + 1) / 2, batch.side["colours"][row]


@pytest.mark.parametrize(
    "steps",
    [
        [], [RandomFlip(1.0)], [PadCrop(5)], [RandomFlip(), PadCrop(5)],
        [PadCrop(5), RandomFlip(), PadCrop(9), RandomFlip()], [PadCrop(40)],
    ],
)  # fmt: skip
def test_a_map_of_the_images_size_stays_the_image(
    records: list[ImageRecord], steps: list[PixelTransform]
) -> None:
    """Pixel by pixel, and the mirror image has its channels exchanged."""
    transform = ImageTransform((32, 16), MEAN, STD, steps, maps=[Channels()])
    mirrored = 0
    for batch in train_batches(records, transform):
        for row in range(len(batch.index)):
            image, values = places(batch, row)
            exchanged = image[[0, 2, 1]]
            same, other = (
                torch.allclose(values, image, atol=1e-6),
                torch.allclose(values, exchanged, atol=1e-6),
            )
            assert same or other
            mirrored += other and not same
    fixed = [step for step in steps if isinstance(step, RandomFlip)]
    assert bool(mirrored) == bool(fixed)


def test_crops_and_a_coarser_map(records: list[ImageRecord]) -> None:
    """The map of a stretched part is near the mean of the stretched pixels."""
    smooth = np.linspace(0, 255, 128 * 64).reshape(128, 64)
    picture = np.stack([smooth, smooth[::-1], smooth[:, ::-1]], 2).astype(np.uint8)
    for record in records:
        Image.fromarray(picture).save(record.path)
    steps = [PadCrop(6), RandomResizedCrop(area=(0.4, 0.7)), RandomFlip()]
    transform = ImageTransform((128, 64), MEAN, STD, steps, maps=[Channels(4)])
    for batch in train_batches(records, transform):
        assert batch.side["colours"].shape == (4, 3, 32, 16)
        for row in range(4):
            image, values = places(batch, row)
            means = torch.nn.functional.avg_pool2d(image[None], 4)[0]
            errors = [(values - shown).abs().mean() for shown in (means, means[[0, 2, 1]])]
            assert min(errors) < 0.03, errors


def test_shifts_by_parts_of_a_place() -> None:
    values = np.zeros((3, 8, 4), np.float32)
    values[0, 4, 1] = 1
    source = Channels(4)
    still = move_map(values, (32, 16), source, ())
    assert np.array_equal(still, values)
    moved = move_map(values, (32, 16), source, [Move(down=6, right=-4)])
    assert moved[0, 5, 0] == moved[0, 6, 0] == pytest.approx(0.5)
    assert moved.sum() == pytest.approx(1)
    gone = move_map(values, (32, 16), source, [Move(down=16), Move(down=-16)])
    assert not gone.any(), "what left the image does not come back"
    crop = move_map(values, (32, 16), source, [Crop(16, 0, 8, 8)])
    assert crop[0].argmax() == crop[0].max(1).argmax() * 4 + crop[0].max(0).argmax()
    assert crop[0, :4, 2:].max() > 0.8
    assert not crop[0, 6:].any()


def test_the_matrix_of_a_resize_is_the_resize() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for size in ((20, 10), (40, 30), (64, 17)):
        rows, columns = (resize_matrix(old, new, "bilinear")
                         for old, new in zip((40, 30), size, strict=True))  # fmt: skip
        assert np.allclose(rows.sum(1), 1)
        found = rows @ pixels.astype(np.float32).transpose(2, 0, 1) @ columns.T
        assert np.abs(found - resize(pixels, size, "bilinear").transpose(2, 0, 1)).max() < 1.1
    assert np.array_equal(resize_matrix(5, 5, "bilinear"), np.eye(5))


def test_maps_change_no_image_and_no_random_number(records: list[ImageRecord]) -> None:
    steps = [RandomFlip(), PadCrop(5), RandomResizedCrop(), RandomErasing(mean=MEAN)]
    plain = train_batches(records, ImageTransform((32, 16), MEAN, STD, steps))
    beside = ImageTransform((32, 16), MEAN, STD, steps, maps=[Channels(4)])
    for num_workers in (0, 1):
        with_maps = train_batches(records, beside, num_workers)
        for one, other in zip(plain, with_maps, strict=True):
            assert all(
                torch.equal(x, y) for x, y in itertools.islice(zip(one, other, strict=True), 4)
            )
            assert one.side == {}
            assert other.maps == {"colours": (0, 2, 1)}
    again = train_batches(records, beside)
    for one, other in zip(with_maps, again, strict=True):
        assert torch.equal(one.side["colours"], other.side["colours"]), "workers change nothing"


def test_the_mirrored_batch_and_the_one_without_pixels(records: list[ImageRecord]) -> None:
    transform = ImageTransform((32, 16), MEAN, STD, maps=[Channels()])
    (batch,) = eval_loader(records, transform, batch_size=8)
    batch = batch._replace(side={**batch.side, "view": torch.arange(8)})
    mirrored = batch.mirrored()
    assert torch.equal(mirrored.image, batch.image.flip(3))
    assert torch.equal(mirrored.side["colours"], batch.side["colours"].flip(3)[:, [0, 2, 1]])
    assert torch.equal(mirrored.side["view"], batch.side["view"])
    assert batch.map(lambda tensor: tensor[:2]).maps == batch.maps
    assert batch.without_pixels().side.keys() == {"view"}


def test_a_missing_map_is_told_before_the_first_image(records: list[ImageRecord]) -> None:
    transform = ImageTransform((32, 16), MEAN, STD, maps=[Channels()])
    with pytest.raises(DataError, match=r"none\.png: has no colours"):
        eval_loader([*records, ImageRecord("none.png")], transform, batch_size=4)
    numbered = [replace(record, extra={"colours": 1.0}) for record in records]
    with pytest.raises(DataError, match=r"0\.png: has numbers of the name 'colours', which a map"):
        eval_loader(numbered, transform, batch_size=4)
    assert map_size((256, 128), 4) == (64, 32)
    assert map_size((2, 2), 4) == (1, 1)
