"""Attention on channels and positions, alone and inside a backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from reid.modeling.attention import ChannelAttention, PositionAttention, build_attention
from reid.modeling.backbones import TimmBackbone
from reid.modeling.weights import load_backbone_weights, save_weights
from reid.structures import Batch


def test_the_least_alike_channels_get_the_weight() -> None:
    torch.manual_seed(0)
    module = ChannelAttention(3)
    feature = torch.randn(2, 3, 2, 2, dtype=torch.float32)
    assert module(feature).equal(feature)  # gamma starts at 0
    nn.init.constant_(module.gamma, 0.7)
    found = module(feature)
    for image, output in zip(feature, found, strict=True):
        for c in range(3):
            energy = torch.tensor([float((image[c] * image[d]).sum()) for d in range(3)])
            weights = (energy.max() - energy).softmax(0)
            expected = image[c] + 0.7 * sum(weights[d] * image[d] for d in range(3))
            torch.testing.assert_close(output[c], expected)


def test_positions_by_their_definition() -> None:
    torch.manual_seed(0)
    module = PositionAttention(8)
    feature = torch.randn(1, 8, 3, 2)
    assert module(feature).equal(feature)
    nn.init.constant_(module.gamma, 0.5)
    query, key, value = (
        layer(feature)[0].flatten(1) for layer in (module.query, module.key, module.value)
    )
    found = module(feature)[0].flatten(1)
    for n in range(6):
        weights = torch.stack([query[:, n] @ key[:, m] for m in range(6)]).softmax(0)
        expected = feature[0].flatten(1)[:, n] + 0.5 * (value * weights).sum(1)
        torch.testing.assert_close(found[:, n], expected)


def test_unknown_kinds_and_small_maps() -> None:
    with pytest.raises(ValueError, match="needs a map with 8 channels or more, got 4"):
        build_attention("positions", 4)
    with pytest.raises(ValueError, match="attention: expected channels or positions, got 'pixels'"):
        build_attention("pixels", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stages of the network \(layer1, .*\), got 'layer9'"):
        TimmBackbone("test_resnet", (64, 32), attention={"layer9": "channels"})
    with pytest.raises(ValueError, match="got 'layer1'"):
        TimmBackbone("test_vit", (64, 64), attention={"layer1": "channels"})


def test_a_backbone_with_attention_takes_weights_without_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = TimmBackbone("test_resnet", (64, 32)).eval()
    both: dict[str, str] = {"layer1": "channels", "layer3": "positions"}
    other = TimmBackbone("test_resnet", (64, 32), attention=both).eval()  # type: ignore[arg-type]
    assert isinstance(other.net.layer3.attention, PositionAttention)  # type: ignore[union-attr]
    save_weights(tmp_path / "plain.safetensors", plain.state_dict(), {})
    report = load_backbone_weights(other, tmp_path / "plain.safetensors")
    assert all(".attention." in name for name in report.missing)
    assert "net.layer1.attention.gamma" in report.missing
    batch = Batch.of(torch.randn(2, 3, 64, 32))
    with torch.no_grad():
        assert other(batch).tokens.equal(plain(batch).tokens)
        nn.init.constant_(other.net.layer1.attention.gamma, 0.3)  # type: ignore[union-attr,arg-type]
        assert not torch.allclose(other(batch).tokens, plain(batch).tokens)


def test_a_resnet_without_its_last_stage() -> None:
    torch.manual_seed(0)
    whole = TimmBackbone("test_resnet", (64, 32), last_stride=1).eval()
    cut = TimmBackbone("test_resnet", (64, 32), last_stride=1).eval()
    cut.load_state_dict(whole.state_dict())
    stage = cut.split_last_stage()
    batch = Batch.of(torch.randn(2, 3, 64, 32))
    with torch.no_grad():
        tokens, grid, _ = cut(batch)
        assert tokens.shape == (2, 1 + grid[0] * grid[1], cut.embed_dim)
        map_ = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        found = stage(map_).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, whole(batch).tokens[:, 1:])
    with pytest.raises(ValueError, match="expected a ResNet of timm"):
        cut.split_last_stage()
    with pytest.raises(ValueError, match="pool: expected avg or max"):
        TimmBackbone("test_resnet", (64, 32), pool="gem").split_last_stage()
