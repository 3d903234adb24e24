from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.memories import ProxyMemory
from reid.structures import FeatureSet


def filled(momentum: float = 0.2, **options: str) -> tuple[ProxyMemory, Tensor, Tensor]:
    """A memory of 4 rows and 3 banks, the rows of 12 images, and their features (3, 12, 16)."""
    row = torch.arange(12) % 4
    banks = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
    banks = F.normalize(banks, dim=2)
    memory = ProxyMemory(momentum, **options)  # type: ignore[arg-type]
    memory.reset(row, 4, FeatureSet.of(banks[0], unit=banks.transpose(0, 1)))
    return memory, row, banks


def test_it_starts_as_normalised_means() -> None:
    memory, row, banks = filled()
    for number in range(4):
        mean = banks[:, row == number].mean(1)
        torch.testing.assert_close(memory.rows[:, number], F.normalize(mean, dim=1))


def test_filling_in_parts_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = filled()[0].rows
    monkeypatch.setattr("reid.modeling.memories._FILLED_AT_ONCE", 5)
    assert torch.equal(filled()[0].rows, expected)


ROWS = [[0, 0, 0, 0], [2, 0, 2, 1, 0, 2, 2], [3, 3, 1, -1, 0, -1, 3], [-1, 2], [-1, -1], [1], []]


@pytest.mark.parametrize("rows", ROWS)
def test_sequential_update_is_sample_by_sample(rows: list[int]) -> None:
    memory, _, _ = filled()
    expected = memory.rows.clone()
    feature = F.normalize(torch.randn(3, len(rows), 16), dim=2)
    for b, row in enumerate(rows):
        if row >= 0:
            mixed = 0.2 * expected[:, row] + 0.8 * feature[:, b]
            expected[:, row] = F.normalize(mixed, dim=1)
    memory.update(torch.tensor(rows, dtype=torch.int64), feature)
    torch.testing.assert_close(memory.rows, expected)


@pytest.mark.parametrize("rows", ROWS)
def test_hard_update_takes_the_least_similar_sample(rows: list[int]) -> None:
    memory, _, _ = filled(update="hard")
    expected = memory.rows.clone()
    feature = F.normalize(torch.randn(3, len(rows), 16), dim=2)
    for row in {row for row in rows if row >= 0}:
        samples = [b for b, other in enumerate(rows) if other == row]
        for m in range(3):
            old = expected[m, row].clone()
            hardest = min(samples, key=lambda b, m=m, old=old: float(old @ feature[m, b]))
            expected[m, row] = F.normalize(0.2 * old + 0.8 * feature[m, hardest], dim=0)
    memory.update(torch.tensor(rows, dtype=torch.int64), feature)
    torch.testing.assert_close(memory.rows, expected)


def test_of_equally_hard_samples_the_first_counts() -> None:
    memory = ProxyMemory(0.5, "hard")
    memory.reset(torch.tensor([0]), 1, FeatureSet.of(torch.tensor([[1.0, 0.0]])))
    memory.update(torch.tensor([0, 0]), torch.tensor([[[0.0, 1.0], [0.0, -1.0]]]))
    assert float(memory.rows[0, 0, 1]) > 0


def test_it_moves_only_after_a_step_and_is_in_no_checkpoint() -> None:
    memory, row, banks = filled()
    before = memory.rows.clone()
    memory.update(row, banks, torch.tensor(False))
    assert torch.equal(memory.rows, before)
    other, _, _ = filled()
    memory.update(row, banks, torch.tensor(True))
    other.update(row, banks)
    assert torch.equal(memory.rows, other.rows)
    assert not torch.equal(memory.rows, before)
    assert memory.state_dict() == {}


@pytest.mark.parametrize("update", ["sequential", "hard"])
def test_a_gradient_is_that_of_the_memory(update: str) -> None:
    memory, _, banks = filled(update=update)
    before = memory.rows.clone()
    chosen = torch.tensor([[0, 2]]).expand(3, 12, 2)
    feature = banks.clone().requires_grad_()
    every = memory.similarity(feature)
    some = memory.similarity_to(feature, chosen)
    (every.sum() + some.sum()).backward()
    expected = before.sum(1, keepdim=True) + before[:, [0, 2]].sum(1, keepdim=True)
    torch.testing.assert_close(feature.grad, expected.expand_as(banks))
    torch.testing.assert_close(every.detach().gather(2, chosen), some.detach())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="memory_dtype: expected fp32 or bf16, got 'fp16'"):
        ProxyMemory(0.2, dtype="fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="momentum: expected 0 <= momentum <= 1, got 2"):
        ProxyMemory(2.0)
    with pytest.raises(ValueError, match="update: expected sequential, hard or fixed, got 'mean'"):
        ProxyMemory(0.2, "mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("update", ["sequential", "hard"])
def test_a_bf16_memory_moves_in_fp32_and_rounds_once(rows: list[int], update: str) -> None:
    memory, _, _ = filled(update=update, dtype="bf16")
    assert memory.rows.dtype == torch.bfloat16
    wide, _, _ = filled(update=update)
    wide.rows = memory.rows.float()
    feature = F.normalize(torch.randn(3, len(rows), 16), dim=2)
    for one in (memory, wide):
        one.update(torch.tensor(rows, dtype=torch.int64), feature)
    assert torch.equal(memory.rows, wide.rows.bfloat16())


@pytest.mark.parametrize("block", [1, 7 * 3 * 16, 2**20])
def test_products_with_a_bf16_memory_are_those_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("reid.modeling.memories._BLOCK_NUMBERS", block)
    generator = torch.Generator().manual_seed(0)
    exact = F.normalize(torch.randn(3, 50, 16, generator=generator), dim=2)
    memory = ProxyMemory(0.2, dtype="bf16")
    memory.rows = exact.bfloat16()
    given = F.normalize(torch.randn(3, 8, 16, generator=generator), dim=2)
    weight = torch.randn(3, 8, 50, generator=generator)
    gradients = []
    products = []
    for rows in (memory.rows, memory.rows.float()):
        feature = given.clone().requires_grad_()
        memory.rows = rows
        product = memory.similarity(feature)
        (product * weight).sum().backward()
        products.append(product.detach())
        assert feature.grad is not None
        gradients.append(feature.grad)
    torch.testing.assert_close(*products, atol=1e-6, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)
    # The error that the docstring states, beside unrounded rows.
    full = given @ exact.transpose(1, 2)
    assert 0 < float((products[0] - full).abs().max()) <= 2**-9
    memory.rows = exact.bfloat16()
    assert float((memory.scores(given) - full).abs().max()) <= 3 * 2**-9 + 1e-6
    chosen = torch.arange(24).view(3, 8, 1)
    taken = memory.similarity_to(given, chosen)
    torch.testing.assert_close(taken, products[0].gather(2, chosen), atol=1e-6, rtol=0)


def test_scores_of_an_fp32_memory_are_its_similarities() -> None:
    memory, _, banks = filled()
    assert torch.equal(memory.scores(banks), memory.similarity(banks))
    assert memory.similarity(banks).is_contiguous()
