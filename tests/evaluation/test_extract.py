from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reid.evaluation.extract import Precision, extract_features
from reid.structures import Batch, DataError, Embeddings, ImageRecord

RECORDS = [ImageRecord(f"{i}.jpg", i, i % 2) for i in range(5)]
CPU = torch.device("cpu")


class Echo(nn.Module):
    """The image's first pixel and the camera as a feature; BatchNorm would change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, image: Tensor, camid: Tensor) -> Embeddings:
        feature = self.norm(torch.stack((image[:, 0, 0, 0], camid.float()), 1))
        return Embeddings(feature, feature[:, None], feature, feature)


def batch(rows: list[int], value: float | None = None) -> Batch:
    index = torch.tensor(rows)
    image = index.float() if value is None else torch.full((len(rows),), value)
    return Batch(image[:, None, None, None].expand(-1, 3, 2, 2), index, index % 2, index)


def test_rows_are_placed_by_index() -> None:
    model = Echo().train()
    done: list[tuple[int, int]] = []
    found = extract_features(
        model, [batch([3, 1]), batch([4, 0]), batch([2, 3])], RECORDS, CPU,
        lambda *counts: done.append(counts),
    )  # fmt: skip
    assert model.training
    assert model.norm.num_batches_tracked == 0
    torch.testing.assert_close(found.global_feat[:, 0] * (1 + 1e-5) ** 0.5, torch.arange(5.0))
    assert found.part_feats.shape == (5, 1, 2)
    assert found.pids.tolist() == [0, 1, 2, 3, 4]
    assert found.camids.tolist() == [0, 1, 0, 1, 0]
    assert done[-1] == (5, 5)


def test_flip_test_averages_with_the_mirror_image() -> None:
    class Corner(nn.Module):
        def forward(self, image: Tensor, camid: Tensor) -> Embeddings:
            left, right = image[:, 0, 0, 0], image[:, 0, 0, -1]
            feature = nn.functional.normalize(torch.stack((left, right, left * 0 + 1), 1), dim=1)
            return Embeddings(feature, feature[:, None], feature, feature)

    one = batch([0, 1, 2, 3, 4])
    image = one.image.clone()
    image[..., -1] = 3.0
    before = image.clone()
    one = one._replace(image=image)
    plain = extract_features(Corner(), [one], RECORDS, CPU)
    flipped = extract_features(Corner(), [one], RECORDS, CPU, flip=True)
    other = plain.global_feat[:, [1, 0, 2]]
    expected = nn.functional.normalize(plain.global_feat + other, dim=1)
    torch.testing.assert_close(flipped.global_feat, expected)
    torch.testing.assert_close(flipped.part_feats[:, 0], expected)
    assert torch.equal(one.image, before)


def test_images_that_could_not_be_read_are_zero() -> None:
    found = extract_features(Echo(), [batch([3, 1]), batch([4])], RECORDS, CPU, allow_missing=True)
    assert found.global_feat.any(1).tolist() == [False, True, False, True, True]
    assert not found.part_feats[[0, 2]].any()
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

    def forward(self, image: Tensor, camid: Tensor) -> Embeddings:
        feature = image.flatten(1) @ self.weight
        self.seen.append(feature.dtype)
        return Embeddings(feature, feature[:, None].expand(-1, 2, -1), feature, feature)


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
    assert low.global_feat.dtype == low.part_feats.dtype == torch.float32
    difference = (full.global_feat - low.global_feat).abs().max() / full.global_feat.abs().max()
    assert 0 < difference < 2 * error
    assert not low.global_feat.is_inference()  # a memory is made of it, and changed in place


def test_features_are_copies_of_what_the_model_gives() -> None:
    class Reuses(nn.Module):
        """Gives the same tensor for each batch, as CUDA graphs do."""

        def __init__(self) -> None:
            super().__init__()
            self.out = torch.empty(1, 2)

        def forward(self, image: Tensor, camid: Tensor) -> Embeddings:
            self.out.fill_(float(image[0, 0, 0, 0]))
            return Embeddings(self.out, self.out[:, None], self.out, self.out)

    found = extract_features(Reuses(), [batch([i]) for i in range(5)], RECORDS, CPU)
    assert found.global_feat[:, 0].tolist() == found.part_feats[:, 0, 1].tolist() == [0, 1, 2, 3, 4]
