from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reid.data.augmentation import PadCrop, RandomErasing, RandomFlip, RandomPatch
from reid.data.cache import FileCache, ImageCache, PixelCache
from reid.data.loaders import OnError, _Draws, eval_loader, train_loader
from reid.data.samplers import PKSampler
from reid.data.transforms import ImageTransform
from reid.structures import Batch, DataError, ImageRecord, PseudoLabels

SIZE, MEAN, STD = (16, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
PLAIN = ImageTransform(SIZE, MEAN, STD)
STEPS = [RandomFlip(), PadCrop(2), RandomPatch(), RandomErasing(mean=MEAN)]


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (20, 12, 3), dtype=np.uint8)).save(path)
        found.append(ImageRecord(str(path), i // 5, i % 3))
    return found


def batches(
    records: list[ImageRecord],
    epochs: Sequence[int] = (0,),
    num_workers: int = 0,
    cache: ImageCache | None = None,
    on_error: OnError = "stop",
) -> list[Batch]:
    sampler = PKSampler(4, images_per_identity=2, steps_per_epoch=3)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(10) // 5))
    loader = train_loader(records, ImageTransform(SIZE, MEAN, STD, STEPS), sampler,
                          cache=cache, on_error=on_error, num_workers=num_workers)  # fmt: skip
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found += list(loader)
    return found


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x[:4], y[:4], strict=True)
    )


def test_training_batches_depend_on_seed_and_epoch_alone(records: list[ImageRecord]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = batches(records)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert equal(first, batches(records, num_workers=2))
    assert not equal(first, batches(records, [1]))
    assert first[0].image.shape == (4, 3, 16, 8)
    assert first[0].image.dtype == torch.float32
    assert first[0].camid.dtype == first[0].index.dtype == torch.int64
    for batch in first:
        assert batch.camid.tolist() == [records[i].camid for i in batch.index]


def test_a_seed_gives_a_fresh_generator_whatever_was_drawn_before() -> None:
    draws = _Draws()
    for seed in (5, 2**63 + 1, 0, 5):
        expected = np.random.Generator(np.random.Philox(key=seed))
        found = draws.seeded(seed)
        assert found.random(3).tolist() == expected.random(3).tolist()
        assert found.integers(9, dtype=np.int32) == expected.integers(9, dtype=np.int32)
        assert np.array_equal(found.standard_normal(7), expected.standard_normal(7))


def test_an_image_that_comes_twice_in_an_epoch_looks_different(records: list[ImageRecord]) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in batches(records, range(3)):
        for row, image in zip(batch.index.tolist(), batch.image, strict=True):
            seen.setdefault(row, []).append(image)
    again = [images for images in seen.values() if len(images) > 1]
    assert again
    assert not any(torch.equal(images[0], images[1]) for images in again)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["pixels", "files"])
def test_the_cache_changes_no_batch_and_no_file_is_read_twice(
    records: list[ImageRecord], num_workers: int, kind: str
) -> None:
    expected = batches(records, [0, 1])
    cache: ImageCache = PixelCache(10, SIZE, num_workers=num_workers)
    if kind == "files":
        cache = FileCache([record.path for record in records], num_workers=num_workers)
    assert equal(batches(records, [0, 1], num_workers, cache), expected)
    plain = list(eval_loader(records, PLAIN, batch_size=4))
    cached = eval_loader(records, PLAIN, batch_size=4, cache=cache, num_workers=num_workers)
    assert equal(list(cached), plain)
    for record in records:
        Path(record.path).unlink()
    assert equal(list(cached), plain)
    assert equal(batches(records, [0, 1], num_workers, cache), expected)


@pytest.mark.parametrize("world_size", [1, 3, 4, 12])
def test_shares_cover_everything(records: list[ImageRecord], world_size: int) -> None:
    seen: list[int] = []
    sizes = set()
    for rank in range(world_size):
        loader = eval_loader(records, PLAIN, batch_size=4, rank=rank, world_size=world_size)
        rows = [int(i) for batch in loader for i in batch.index]
        sizes.add(len(rows))
        seen += rows
    assert len(sizes) == 1
    assert set(seen) == set(range(10))
    assert seen[:10] == list(range(10))


def break_files(records: Sequence[ImageRecord]) -> None:
    for record in records:
        Path(record.path).write_bytes(b"no image")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_stops_with_its_path(
    records: list[ImageRecord], num_workers: int
) -> None:
    break_files(records[3:4])
    loader = eval_loader(records, PLAIN, batch_size=4, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^\S+3\.png: is not a readable image \([^\n]*\)$"):
        list(loader)
    with pytest.raises(DataError, match=r"3\.png: is not a readable image"):
        batches(records, range(4), num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_skipped_and_counted(
    records: list[ImageRecord], num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = list(eval_loader(records, PLAIN, batch_size=4))
    break_files([records[1], *records[4:8]])
    loader = eval_loader(records, PLAIN, batch_size=4, on_error="skip", num_workers=num_workers)
    found = list(loader)
    assert [batch.index.tolist() for batch in found] == [[0, 2, 3], [8, 9]]
    assert torch.equal(found[0].image, whole[0].image[[0, 2, 3]])
    assert found[0].camid.tolist() == [0, 2, 0]
    (warning,) = caplog.messages
    assert warning.startswith(
        "5 of 10 images were skipped, since they cannot be read (5 different files):\n"
    )
    assert "1.png: is not a readable image" in warning
    assert warning.count("\n") == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_of_training_shrinks(
    records: list[ImageRecord], num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    kept = STEPS[2]
    whole = batches(records)
    bad = whole[0].index[1]
    break_files([records[bad]])
    STEPS[2] = RandomPatch(0)  # it would read other images, unreadable ones too
    try:
        expected = batches_without(records, int(bad))
        with caplog.at_level(logging.WARNING):
            found = batches(records, on_error="skip", num_workers=num_workers)
    finally:
        STEPS[2] = kept
    assert [batch.index.tolist() for batch in found] == expected
    lost = sum(len(batch.index) for batch in whole) - sum(len(batch.index) for batch in found)
    assert f"{lost} of 12 images were skipped" in caplog.text
    assert "(1 different files)" in caplog.text


def batches_without(records: list[ImageRecord], bad: int) -> list[list[int]]:
    sampler = PKSampler(4, images_per_identity=2, steps_per_epoch=3)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(10) // 5))
    return [[draw.index for draw in batch if draw.index != bad] for batch in sampler]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_images_in_a_training_batch(
    records: list[ImageRecord], num_workers: int
) -> None:
    break_files(records)
    with pytest.raises(DataError, match=r"4 of 4 images of a batch cannot be read.*\d\.png"):
        batches(records, [0], num_workers, on_error="skip")


def test_no_readable_image_at_all(records: list[ImageRecord]) -> None:
    break_files(records)
    assert list(eval_loader(records, PLAIN, batch_size=4, on_error="skip")) == []


def test_views_have_their_own_transforms_and_random_numbers(records: list[ImageRecord]) -> None:
    sampler = PKSampler(4, images_per_identity=2, steps_per_epoch=3)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(10) // 5))
    strong = ImageTransform(SIZE, MEAN, STD, STEPS)
    batch = next(iter(train_loader(records, strong, sampler, views=[strong, PLAIN])))
    assert [view.shape for view in batch.views] == [batch.image.shape] * 2
    assert not torch.equal(batch.views[0], batch.image)
    alone = next(iter(train_loader(records, strong, sampler)))
    assert torch.equal(alone.image, batch.image)
    rows = batch.index.tolist()
    plain = next(iter(eval_loader([records[row] for row in rows], PLAIN, batch_size=4)))
    assert torch.equal(batch.views[1], plain.image)
