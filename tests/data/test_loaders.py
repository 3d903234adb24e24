from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reid.data.loaders import eval_loader, train_loader
from reid.data.samplers import PKSampler
from reid.data.transforms import eval_transform, train_transform
from reid.structures import Batch, DataError, ImageRecord, PseudoLabels

FORMAT = ((16, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)).save(path)
        found.append(ImageRecord(str(path), i // 5, i % 3))
    return found


def batches(records: list[ImageRecord], epoch: int, num_workers: int) -> list[Batch]:
    sampler = PKSampler(4, images_per_identity=2, steps_per_epoch=3)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(10) // 5))
    transform = train_transform(*FORMAT, flip_prob=0.5, pad=2, erasing_prob=0.5)
    loader = train_loader(records, transform, sampler, num_workers=num_workers)
    sampler.set_epoch(epoch)
    return list(loader)


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_training_batches_depend_on_seed_and_epoch_alone(records: list[ImageRecord]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = batches(records, 0, num_workers=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert equal(first, batches(records, 0, num_workers=2))
    assert not equal(first, batches(records, 1, num_workers=0))
    assert first[0].image.shape == (4, 3, 16, 8)
    assert first[0].pid.dtype == first[0].index.dtype == torch.int64
    for batch in first:
        assert batch.pid.tolist() == [records[i].pid for i in batch.index]
        assert batch.camid.tolist() == [records[i].camid for i in batch.index]


@pytest.mark.parametrize("world_size", [1, 3, 4, 12])
def test_shares_cover_everything(records: list[ImageRecord], world_size: int) -> None:
    seen: list[int] = []
    sizes = set()
    for rank in range(world_size):
        loader = eval_loader(
            records, eval_transform(*FORMAT), batch_size=4, rank=rank, world_size=world_size
        )
        rows = [int(i) for batch in loader for i in batch.index]
        sizes.add(len(rows))
        seen += rows
    assert len(sizes) == 1
    assert set(seen) == set(range(10))
    assert seen[:10] == list(range(10))


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0cut"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image(records: list[ImageRecord], content: bytes, num_workers: int) -> None:
    Path(records[3].path).write_bytes(content)
    loader = eval_loader(records, eval_transform(*FORMAT), batch_size=4, num_workers=num_workers)
    with pytest.raises(DataError, match=r"3\.png: is not a readable image"):
        list(loader)


def test_cut_off_image(records: list[ImageRecord], tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 80).save(path)
    path.write_bytes(path.read_bytes()[:900])
    loader = eval_loader([ImageRecord(str(path))], eval_transform(*FORMAT), batch_size=1)
    with pytest.raises(DataError, match=r"cut\.jpg: is not a readable image"):
        list(loader)


def test_grey_and_palette_images_become_rgb(tmp_path: Path) -> None:
    found = []
    for mode in ("L", "P", "RGBA", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (8, 16)).save(tmp_path / f"{mode}.{suffix}")
        found.append(ImageRecord(str(tmp_path / f"{mode}.{suffix}")))
    (batch,) = eval_loader(found, eval_transform(*FORMAT), batch_size=4)
    assert batch.image.shape == (4, 3, 16, 8)
