from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reid.modeling.backbones import TimmBackbone
from reid.modeling.heads import BNNeckHead
from reid.modeling.model import ReIDModel
from reid.modeling.vit import ViT
from reid.pictures.attention import attention_paths, attention_rollout, rollout_maps
from reid.projects.tmgf import IBNViT, TMGFHead
from reid.structures import Batch


def layer(*heads: list[list[float]]) -> Tensor:
    return torch.tensor([heads])


def test_three_layers_by_hand() -> None:
    """Two tokens, two heads in the first layer.

    A1 = mean of [[1, 0], [0, 1]] and [[0, 1], [0, 1]] = [[1/2, 1/2], [0, 1]]
    A2 = [[0, 1], [0, 1]], A3 = [[1/2, 1/2], [1/2, 1/2]]
    A1' = [[3/4, 1/4], [0, 1]], A2' = [[1/2, 1/2], [0, 1]], A3' = [[3/4, 1/4], [1/4, 3/4]]
    A2' A1' = [[3/8, 5/8], [0, 1]]
    A3' A2' A1' = [[9/32, 23/32], [3/32, 29/32]]
    """
    first = layer([[1, 0], [0, 1]], [[0, 1], [0, 1]])
    second, third = layer([[0, 1], [0, 1]]), layer([[0.5, 0.5], [0.5, 0.5]])
    found = attention_rollout([first, second, third])
    torch.testing.assert_close(found, torch.tensor([[[9 / 32, 23 / 32], [3 / 32, 29 / 32]]]))
    # the order matters: A1' A2' A3' = [[3/4, 1/4], [0, 1]] [[1/2, 1/2], [1/4, 3/4]]
    found = attention_rollout([third, second, first])
    torch.testing.assert_close(found, torch.tensor([[[7 / 16, 9 / 16], [1 / 4, 3 / 4]]]))


def test_fusion_of_heads_by_hand() -> None:
    """Max of the heads [[1, 1], [0, 1]]: A' = [[1, 1/2], [0, 1]], rows made to sum to 1 again."""
    heads = layer([[1, 0], [0, 1]], [[0, 1], [0, 1]])
    most = attention_rollout([heads], "max")
    torch.testing.assert_close(most, torch.tensor([[[2 / 3, 1 / 3], [0, 1]]]))
    least = attention_rollout([heads], "min")
    torch.testing.assert_close(least, torch.tensor([[[1.0, 0], [0, 1]]]))


def test_rollout_errors() -> None:
    with pytest.raises(ValueError, match="expected one layer or more"):
        attention_rollout([])
    with pytest.raises(ValueError, match=r"attentions\[1\]: expected \(1, heads, 2, 2\)"):
        attention_rollout([torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)])


def plain() -> ReIDModel:
    backbone = ViT((64, 32), embed_dim=24, depth=3, num_heads=3)
    return ReIDModel(backbone, BNNeckHead(backbone))


def test_recorded_attention_is_the_models() -> None:
    torch.manual_seed(0)
    model = plain().train()
    batch = Batch.of(torch.randn(2, 3, 64, 32), torch.zeros(2, dtype=torch.int64))
    (found,) = rollout_maps(model, batch)
    assert model.training
    assert found.shape == (2, 4, 2)
    seen = []
    for block in model.backbone.net.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    model.eval()(batch)
    assert len(seen) == 3
    expected = attention_rollout([weights.detach() for weights in seen])[:, 0, 1:]
    torch.testing.assert_close(found, expected.reshape(2, 4, 2))
    assert not any(block.attn._forward_pre_hooks for block in model.backbone.net.blocks)


def test_every_branch_has_its_own_rollout() -> None:
    torch.manual_seed(0)
    backbone = IBNViT((64, 32), embed_dim=24, depth=3, num_heads=3, stem_channels=8)
    model = ReIDModel(backbone, TMGFHead(backbone, granularities=(1, 2)))
    first, second = attention_paths(model)
    assert first[:2] == second[:2]
    assert first[2] is model.head.branches[0][0].attn
    assert second[2] is model.head.branches[1][0].attn
    batch = Batch.of(torch.randn(1, 3, 64, 32), torch.zeros(1, dtype=torch.int64))
    maps = rollout_maps(model, batch)
    torch.testing.assert_close(maps[0], maps[1])  # the branches start as copies
    with torch.no_grad():
        model.head.branches[1][0].attn.qkv.weight.mul_(3)
    changed = rollout_maps(model, batch)
    torch.testing.assert_close(changed[0], maps[0])
    assert not torch.allclose(changed[1], maps[1])


def test_a_network_without_attention_is_an_error() -> None:
    backbone = TimmBackbone("test_resnet", (64, 32))
    with pytest.raises(ValueError, match="TimmBackbone: has no attention layers"):
        attention_paths(ReIDModel(backbone, BNNeckHead(backbone)))
