from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reid import distributed
from reid.evaluation.extract import Precision, extract_features
from reid.structures import Batch, DataError, Embeddings, ImageRecord

RECORDS = [ImageRecord(f"{i}.jpg", i, i % 2) for i in range(5)]
CPU = torch.device("cpu")


def embeddings(feature: Tensor, banks: int) -> Embeddings:
    """The same feature everywhere."""
    bank = feature[:, None].expand(-1, banks, -1)
    return Embeddings(bank, bank, bank, feature)


class Echo(nn.Module):
    """The image's first pixel and the camera as a feature; BatchNorm would change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, batch: Batch) -> Embeddings:
        feature = self.norm(torch.stack((batch.image[:, 0, 0, 0], batch.camid.float()), 1))
        return embeddings(feature, 2)


def batch(rows: list[int], value: float | None = None) -> Batch:
    index = torch.tensor(rows)
    image = index.float() if value is None else torch.full((len(rows),), value)
    return Batch.of(image[:, None, None, None].expand(-1, 3, 2, 2), index % 2, index)


def test_rows_are_placed_by_index() -> None:
    model = Echo().train()
    done: list[tuple[int, int]] = []
    found = extract_features(
        model, [batch([3, 1]), batch([4, 0]), batch([2, 3])], RECORDS, CPU,
        lambda *counts: done.append(counts),
    )  # fmt: skip
    assert model.training
    assert model.norm.num_batches_tracked == 0
    torch.testing.assert_close(found.test[:, 0] * (1 + 1e-5) ** 0.5, torch.arange(5.0))
    assert found.unit.shape == (5, 2, 2)
    assert found.present.all()
    assert found.pids.tolist() == [0, 1, 2, 3, 4]
    assert found.camids.tolist() == [0, 1, 0, 1, 0]
    assert done[-1] == (5, 5)


def test_flip_test_averages_with_the_mirror_image() -> None:
    class Corner(nn.Module):
        def forward(self, batch: Batch) -> Embeddings:
            left, right = batch.image[:, 0, 0, 0], batch.image[:, 0, 0, -1]
            feature = nn.functional.normalize(torch.stack((left, right, left * 0 + 1), 1), dim=1)
            return embeddings(feature, 2)

    one = batch([0, 1, 2, 3, 4])
    image = one.image.clone()
    image[..., -1] = 3.0
    before = image.clone()
    one = one._replace(image=image)
    plain = extract_features(Corner(), [one], RECORDS, CPU)
    flipped = extract_features(Corner(), [one], RECORDS, CPU, flip=True)
    other = plain.test[:, [1, 0, 2]]
    expected = nn.functional.normalize(plain.test + other, dim=1)
    torch.testing.assert_close(flipped.test, expected)
    torch.testing.assert_close(flipped.unit[:, 1], expected)
    assert torch.equal(one.image, before)


def test_raw_features_are_those_before_the_neck() -> None:
    class Raw(nn.Module):
        def forward(self, batch: Batch) -> Embeddings:
            pixels = batch.image[:, 0, 0] + 1
            unit = nn.functional.normalize(pixels)
            return Embeddings(pixels[:, None], pixels[:, None], unit[:, None], unit)

    first, second = batch([3, 1, 4]), batch([0])
    image = first.image.clone()
    image[..., -1] = 9.0
    batches = [first._replace(image=image), second]
    records = RECORDS
    assert extract_features(Raw(), [batch([0, 1, 2, 3, 4])], records, CPU).raw is None
    found = extract_features(Raw(), batches, records, CPU, raw="global", allow_missing=True)
    expected = torch.tensor([[1.0, 1.0], [2.0, 10.0], [0.0, 0.0], [4.0, 10.0], [5.0, 10.0]])
    assert found.raw is not None
    torch.testing.assert_close(found.raw, expected)
    flipped = extract_features(
        Raw(), batches, records, CPU, raw="global", flip=True, allow_missing=True
    )
    assert flipped.raw is not None
    torch.testing.assert_close(flipped.raw, (expected + expected.flip(1)) / 2)
    every = extract_features(Raw(), batches, records, CPU, raw="all", allow_missing=True)
    assert every.raw is not None  # there is one bank
    torch.testing.assert_close(every.raw, expected)
    part = found[found.present]
    assert part.raw is not None
    torch.testing.assert_close(part.raw, expected[found.present])
    assert found[:2].raw is not None


def test_images_that_could_not_be_read_are_not_present() -> None:
    found = extract_features(Echo(), [batch([3, 1]), batch([4])], RECORDS, CPU, allow_missing=True)
    assert found.present.tolist() == [False, True, False, True, True]
    assert not found.test[[0, 2]].any()
    assert not found.unit[[0, 2]].any()
    with pytest.raises(DataError, match=r"none of 5 images could be read, the first is 0\.jpg"):
        extract_features(Echo(), [], RECORDS, CPU, allow_missing=True)


def test_errors() -> None:
    with pytest.raises(ValueError, match="1 of 5 images were in no batch"):
        extract_features(Echo(), [batch([0, 1, 2, 3])], RECORDS, CPU)
    with pytest.raises(FloatingPointError, match=r"not finite, the first is 3\.jpg"):
        extract_features(Echo(), [batch([0, 1, 2]), batch([3, 4], torch.nan)], RECORDS, CPU)
    with pytest.raises(ValueError, match="one image or more"):
        extract_features(Echo(), [], [], CPU)
    with pytest.raises(ValueError, match="expected one of fp32, bf16, fp16, got 'half'"):
        extract_features(Echo(), [batch([0, 1, 2, 3, 4])], RECORDS, CPU, precision="half")  # type: ignore[arg-type]


class Linear(nn.Module):
    """A product of the image with fixed weights, as the feature and as two parts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 8, generator=generator))
        self.seen: list[torch.dtype] = []

    def forward(self, batch: Batch) -> Embeddings:
        feature = batch.image.flatten(1) @ self.weight
        self.seen.append(feature.dtype)
        return embeddings(feature, 3)


@pytest.mark.parametrize(
    ("precision", "dtype", "error"),
    [("bf16", torch.bfloat16, 2**-7), ("fp16", torch.float16, 2**-10)],
)
def test_the_network_has_a_precision_of_its_own_and_features_are_fp32(
    precision: Precision, dtype: torch.dtype, error: float
) -> None:
    model = Linear()
    image = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    one = batch([0, 1, 2, 3, 4])._replace(image=image)
    full = extract_features(model, [one], RECORDS, CPU)
    low = extract_features(model, [one], RECORDS, CPU, precision=precision)
    assert model.seen == [torch.float32, dtype]
    assert low.test.dtype == low.unit.dtype == torch.float32
    difference = (full.test - low.test).abs().max() / full.test.abs().max()
    assert 0 < difference < 2 * error
    assert not low.test.is_inference()  # memories are made of it and change in place


def test_features_are_copies_of_what_the_model_gives() -> None:
    class Reuses(nn.Module):
        """Returns the same tensor for each batch, as a CUDA graph does."""

        def __init__(self) -> None:
            super().__init__()
            self.out = torch.empty(1, 2)

        def forward(self, batch: Batch) -> Embeddings:
            self.out.fill_(float(batch.image[0, 0, 0, 0]))
            return embeddings(self.out, 2)

    found = extract_features(Reuses(), [batch([i]) for i in range(5)], RECORDS, CPU)
    assert found.test[:, 0].tolist() == found.unit[:, 1, 1].tolist() == [0, 1, 2, 3, 4]


def test_test_features_of_another_size_than_the_banks() -> None:
    class Wide(nn.Module):
        def forward(self, batch: Batch) -> Embeddings:
            feature = batch.index[:, None].float().expand(-1, 3)
            return embeddings(feature, 2)._replace(test=feature.repeat(1, 2))

    found = extract_features(Wide(), [batch([3, 1]), batch([4, 0, 2])], RECORDS, CPU)
    assert found.test.shape == (5, 6)
    assert found.unit.shape == (5, 2, 3)
    assert found.test[:, 5].tolist() == found.unit[:, 1, 2].tolist() == [0, 1, 2, 3, 4]


def test_an_error_of_one_process_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    Told = tuple[str, bool, str]
    others: list[Told] = [("", False, ""), ("OSError", False, "no space")]
    told: list[Told] = []

    class Broken(nn.Module):
        def forward(self, batch: Batch) -> Embeddings:
            raise OSError("no space")

    def gather(value: Told) -> list[Told]:
        told.append(value)
        return [*others, value]

    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "largest", lambda *numbers: (1,))
    monkeypatch.setattr(distributed, "gather_objects", gather)
    with pytest.raises(OSError, match="no space"):
        extract_features(Broken(), [batch([0])], RECORDS, CPU)
    with pytest.raises(RuntimeError, match="process 1 failed: OSError: no space"):
        extract_features(Echo(), [batch([0])], RECORDS, CPU)
    assert told == [("OSError", False, "no space"), ("", False, "None")]
    others[1] = ("DataError", True, "7.png: is cut off")
    with pytest.raises(DataError, match=r"^7\.png: is cut off"):
        extract_features(Echo(), [batch([0])], RECORDS, CPU)
