from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from reid.modeling.vit import ViT, resize_position_embedding
from reid.modeling.weights import load_backbone_weights, save_weights
from reid.solver import build_optimizer
from reid.structures import Batch

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3, "drop_path": 0.0}


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 16, generator=torch.Generator().manual_seed(1))


def test_plain_patches_are_timms_vit(tmp_path: Path) -> None:
    """The published ViT-S/16, with weights of the square grid of ImageNet."""
    torch.manual_seed(0)
    source = timm.create_model("vit_small_patch16_224", num_classes=7)
    save_weights(tmp_path / "timm.safetensors", source.state_dict(), {})
    backbone = ViT((256, 128)).eval()
    report = load_backbone_weights(backbone, tmp_path / "timm.safetensors")
    assert {*report.unexpected, *report.left_out} == {"head.weight", "head.bias"}
    assert not report.missing
    assert [entry.split()[0] for entry in report.resized] == ["net.pos_embed"]
    whole = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=(256, 128)).eval()
    whole.load_state_dict(backbone.net.state_dict())
    image = torch.randn(1, 3, 256, 128)
    with torch.no_grad():
        tokens, grid, before = backbone(Batch.of(image, torch.tensor([0])))
        torch.testing.assert_close(tokens[:, 0], whole(image))
        torch.testing.assert_close(backbone.net.norm(backbone.net.blocks[-1](before)), tokens)
    assert grid == (16, 8)
    assert tokens.shape == (1, 1 + 16 * 8, 384)


def test_published_sizes() -> None:
    small, base = ViT((256, 128)), ViT((256, 128), embed_dim=768, num_heads=12)
    assert {m.eps for m in base.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.approximate for m in base.modules() if isinstance(m, nn.GELU)} == {"none"}
    for net in (small, base):
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.net.blocks]
        assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert small.net.blocks[0].attn.num_heads == 6
    assert base.net.blocks[0].attn.num_heads == 12


@pytest.mark.parametrize("stem", ["patches", "ibn"])
def test_cameras_change_nothing_unless_they_are_asked_for(stem: Any) -> None:
    off = ViT((32, 16), num_cameras=4, stem=stem, stem_channels=8, **SMALL).eval()
    assert (off.num_cameras, off.camera_embed) == (0, None)
    first, second = off(Batch.of(images(1).expand(2, -1, -1, -1), torch.tensor([0, 3]))).tokens
    torch.testing.assert_close(first, second)
    on = ViT((32, 16), num_cameras=4, stem=stem, stem_channels=8, camera_embedding=True, **SMALL)
    on.eval()
    assert on.num_cameras == 4
    first, second = on(Batch.of(images(1).expand(2, -1, -1, -1), torch.tensor([0, 3]))).tokens
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_a_camera_without_training_images_stays_unknown(optimizer: Any) -> None:
    torch.manual_seed(0)
    net = ViT((32, 16), num_cameras=4, unseen_cameras=[0, 2], camera_embedding=True, **SMALL)
    steps = build_optimizer(net.parameters(), optimizer, lr=0.1, weight_decay=0.1)
    for camid in (torch.tensor([1, 3]), torch.tensor([-1, 3])):
        steps.zero_grad()
        net(Batch.of(images(), camid)).tokens.square().mean().backward()
        steps.step()
    table = net.camera_embed.detach()
    assert table.any(2).any(1).tolist() == [False, True, False, True]
    net.eval()
    found = net(Batch.of(images(1).expand(4, -1, -1, -1), torch.tensor([0, 2, 9, -1]))).tokens
    with torch.no_grad():
        net.camera_embed[1] = (table[1] + table[3]) / 2
    expected = net(Batch.of(images(1), torch.tensor([1]))).tokens
    torch.testing.assert_close(found, expected.expand(4, -1, -1))


def test_sizes_that_do_not_fit() -> None:
    ViT((30, 15), patch_size=15, **SMALL)
    with pytest.raises(ValueError, match="patch_size: expected a multiple of 2, got 15"):
        ViT((30, 15), patch_size=15, stem="ibn", **SMALL)
    with pytest.raises(ValueError, match=r"multiples of the patch size 16, got \[30, 15\]"):
        ViT((30, 15), **SMALL)
    with pytest.raises(ValueError, match=r"expected images of \(32, 16\), got \(16, 16\)"):
        ViT((32, 16), **SMALL)(Batch.of(images()[:, :, :16]))


@pytest.mark.parametrize(("count", "size"), [(128, 16), (192, 24), (196, 14)])
def test_grid_of_a_position_embedding_is_guessed(count: int, size: int) -> None:
    columns = count // size
    rows = torch.arange(float(size))[:, None].expand(size, columns)
    embedding = torch.cat((torch.tensor([99.0]), rows.reshape(-1)))[None, :, None]
    same = resize_position_embedding(embedding, (size, columns))
    torch.testing.assert_close(same, embedding)
    other = resize_position_embedding(embedding, (size // 2, columns))
    assert float(other[0, 0]) == 99
    torch.testing.assert_close(other[0, 1::columns, 0], torch.arange(float(size // 2)) * 2 + 0.5)


def test_position_embedding_without_a_grid() -> None:
    with pytest.raises(ValueError, match="of 7 tokens is no grid of 2:1, 3:1 or 1:1"):
        resize_position_embedding(torch.zeros(1, 8, 4), (4, 2))
    with pytest.raises(ValueError, match=r"expected a position embedding \(1, 1 \+ n, D\)"):
        resize_position_embedding(torch.zeros(8, 4), (4, 2))


@pytest.mark.oracle
def test_position_embedding_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("position_embedding*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
        source = a["pretrained"]
        width = round(((source.shape[1] - 1) / float(a["pretrained_height_over_width"])) ** 0.5)
        grid = ((source.shape[1] - 1) // width, width)
        resized = [name for name in a if name.startswith("resized_")]
        assert resized
        for name in resized:
            height, _, width_text = name.removeprefix("resized_").partition("x")
            size = (int(height), int(width_text))
            for given in (grid, None):
                found = resize_position_embedding(source, size, given)
                torch.testing.assert_close(found, a[name], atol=1e-5, rtol=0, msg=f"{path} {name}")
