"""Heads: stripes of a map."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reid.modeling.heads import BNNeckStripeHead, pool_stripes
from reid.registry import ConfigError
from reid.structures import Batch, FeatureTokens


class Backbone(nn.Module):
    embed_dim = 5


def tokens_of(image: torch.Tensor) -> FeatureTokens:
    whole = image.mean((2, 3))[:, None]
    tokens = torch.cat((whole, image.flatten(2).transpose(1, 2)), 1)
    return FeatureTokens(tokens, (image.shape[2], image.shape[3]))


@pytest.mark.parametrize(("height", "count"), [(24, 3), (7, 3), (8, 3), (5, 4), (3, 3), (4, 1)])
def test_stripes_are_those_of_adaptive_pooling(height: int, count: int) -> None:
    image = torch.randn(2, 5, height, 2, generator=torch.Generator().manual_seed(0))
    expected = F.adaptive_avg_pool2d(image, (count, 1))[..., 0]
    found = torch.stack(pool_stripes(tokens_of(image), count), 2)
    torch.testing.assert_close(found, expected)


def test_neighbouring_stripes_share_a_row_if_the_height_is_no_multiple() -> None:
    image = torch.zeros(1, 5, 7, 2)
    image[:, :, 2] = 1.0  # the last row of the first stripe, and the first of the second
    first, second, third = pool_stripes(tokens_of(image), 3)
    assert first.tolist() == second.tolist() == [[pytest.approx(1 / 3)] * 5]
    assert not third.any()


def test_banks_have_their_own_necks() -> None:
    head = BNNeckStripeHead(Backbone(), 3)
    for number, neck in enumerate(head.part_necks):
        torch.nn.init.constant_(neck.weight, 2.0 + number)
    image = torch.randn(4, 5, 6, 2, generator=torch.Generator().manual_seed(0))
    found = head.eval()(tokens_of(image), Batch.of(image))
    assert found.pre.shape == found.post.shape == found.unit.shape == (4, 4, 5)
    scale = torch.tensor([1.0, 2, 3, 4])[:, None] / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(found.post, found.pre * scale)
    torch.testing.assert_close(found.unit, F.normalize(found.post, dim=2))
    assert torch.equal(found.test, found.unit[:, 0])
    torch.testing.assert_close(found.pre[:, 0], image.mean((2, 3)))


def test_more_stripes_than_rows() -> None:
    image = torch.zeros(2, 5, 2, 2)
    with pytest.raises(ConfigError, match=r"num_stripes: expected at most 2, the rows .*, got 3"):
        BNNeckStripeHead(Backbone(), 3)(tokens_of(image), Batch.of(image))
    with pytest.raises(ValueError, match="num_stripes: expected 1 or more, got 0; BNNeckHead"):
        BNNeckStripeHead(Backbone(), 0)
