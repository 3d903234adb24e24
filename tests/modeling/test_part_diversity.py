"""The loss that keeps parts apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reid.modeling.part_diversity import PartDiversity, mean_part_cosine
from reid.structures import Batch, Embeddings


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([[1, 0], [3, 0]], 1.0),  # lengths do not count
        ([[1, 0], [0, 2]], 0.0),
        ([[1, 0], [-2, 0]], -1.0),
        ([[1, 0], [0, 1], [1, 0]], 1 / 3),  # one of three pairs
        ([[1, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], -1 / 2),  # the least for three: 120°
        ([[1, 0], [1, 0], [0, 0]], 1 / 3),  # a part of 0 has no direction
    ],
)
def test_by_hand(parts: list[list[float]], expected: float) -> None:
    assert float(mean_part_cosine(torch.tensor([parts]))) == pytest.approx(expected, abs=1e-6)


def test_against_all_pairs() -> None:
    torch.manual_seed(0)
    parts = torch.randn(5, 4, 7, dtype=torch.float64)
    expected = [
        torch.cosine_similarity(image[i], image[j], 0)
        for image in parts for i in range(4) for j in range(4) if i != j
    ]  # fmt: skip
    torch.testing.assert_close(mean_part_cosine(parts), torch.stack(expected).mean())
    torch.testing.assert_close(
        mean_part_cosine(parts.float()), torch.stack(expected).mean().float()
    )


def test_a_part_of_zeros_gets_no_gradient() -> None:
    parts = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]]], requires_grad=True)
    mean_part_cosine(parts).backward()
    assert parts.grad is not None
    assert torch.isfinite(parts.grad).all()
    assert not parts.grad[0, 1].any()
    assert parts.grad[0, 0].any()


def test_mixed_precision_changes_nothing() -> None:
    torch.manual_seed(0)
    parts = torch.randn(3, 6, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mean_part_cosine(parts), mean_part_cosine(parts.clone()))
        found = mean_part_cosine(parts)
    assert torch.equal(found, mean_part_cosine(parts))
    assert mean_part_cosine(parts.bfloat16()).dtype == torch.float32


def test_which_features_are_compared() -> None:
    def banks(*rows: list[float]) -> Tensor:
        return torch.tensor([rows])

    whole = [0.0, 9.0]  # of the whole image: no part
    pre, post = banks(whole, [1, 0], [1, 0]), banks(whole, [1, 0], [0, 1])
    embeddings = Embeddings(pre, post, post, post[:, 0])
    batch = Batch.of(torch.zeros(1, 0))
    assert float(PartDiversity(num_parts=2)(embeddings, batch)["diversity"]) == 1
    assert float(PartDiversity("after", num_parts=2)(embeddings, batch)["diversity"]) == 0


@pytest.mark.parametrize("count", [0, 1])
def test_a_head_without_several_parts(count: int) -> None:
    with pytest.raises(ValueError, match=f"two parts or more, the model's has {count}"):
        PartDiversity(num_parts=count)
