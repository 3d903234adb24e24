from __future__ import annotations

import pytest
import torch

from reid.modeling.contrastive import ProxyGroups, choose_offline, choose_online


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", [[0, 0, 0], [5, -1, 5, 2, 2, 2, -1, 7], [3]])
def test_the_maxima_of_groups_are_those_of_each_group(group: list[int], dtype: torch.dtype) -> None:
    groups = ProxyGroups(torch.tensor(group))
    both = torch.randn(2, 8, len(group), generator=torch.Generator().manual_seed(0), dtype=dtype)
    both[0, 5] = 1.0  # ties: the first counts
    similarity = both.chunk(2, 1)[1]  # not contiguous, as the losses give it
    values, proxies = groups.maxima(similarity)
    assert values.shape == (2, 4, len(groups.sizes))
    for number, members in enumerate(torch.split(groups.order, groups.sizes)):
        best = similarity[:, :, members].max(2)
        assert torch.equal(values[:, :, number], best.values)
        assert torch.equal(proxies[:, :, number], members[best.indices])


def test_a_choice_leaves_the_similarities_as_they_were() -> None:
    group = torch.arange(12) // 3
    groups, cameras = ProxyGroups(group), ProxyGroups(torch.arange(12) % 3)
    similarity = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    before = similarity.clone()
    offline = choose_offline(similarity, torch.tensor([0, 1, 1, 3, 2]), groups, 4)
    assert torch.equal(similarity, before)
    online = choose_online(similarity, cameras, 2, 4)
    assert torch.equal(similarity, before)
    for choice in (offline, online):
        hidden = before.scatter(2, choice.proxies[choice.positive].view(2, 5, -1), -torch.inf)
        hardest = hidden.topk(4, 2).indices.sort(2).values
        assert torch.equal(choice.proxies[..., -4:].sort(2).values, hardest)


def test_a_choice_does_not_disturb_a_gradient() -> None:
    groups = ProxyGroups(torch.arange(12) // 3)
    feature = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = feature * 2
    logits = scores / 0.07
    choose_offline(scores.detach(), torch.tensor([0, 1, 2, 3]), groups, 5)
    (logits.logsumexp(2) + scores.sum(2)).sum().backward()
    assert feature.grad is not None
    assert bool(torch.isfinite(feature.grad).all())
