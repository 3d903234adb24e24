from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reid.modeling.backbones import TimmBackbone, resize_position_embedding
from reid.modeling.heads import BNNeckHead, Neck
from reid.modeling.model import ReIDModel
from reid.modeling.weights import load_backbone_weights, save_weights

CAMID = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("model", "size", "grid"),
    [
        ("test_resnet", (64, 32), (2, 1)),
        ("test_vit", (160, 160), (10, 10)),
        ("test_vit", (96, 48), (6, 3)),
        ("swin_tiny_patch4_window7_224", (224, 224), (7, 7)),
    ],
)
def test_any_timm_model_gives_tokens(
    model: str, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    backbone = TimmBackbone(model, size).eval()
    with torch.no_grad():
        tokens, found = backbone(torch.randn(2, 3, *size), CAMID)
    assert found == grid
    assert tokens.shape == (2, 1 + grid[0] * grid[1], backbone.embed_dim)


def test_pooling_of_a_map() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 64, 64)
    tokens = {}
    for pool in ("avg", "max", "gem"):
        torch.manual_seed(1)
        backbone = TimmBackbone("test_resnet", (64, 64), pool=pool).eval()
        tokens[pool] = backbone(image, CAMID).tokens.detach()
    patches = tokens["avg"][:, 1:]
    torch.testing.assert_close(tokens["avg"][:, 0], patches.mean(1))
    torch.testing.assert_close(tokens["max"][:, 0], patches.amax(1))
    gem = patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
    torch.testing.assert_close(tokens["gem"][:, 0], gem)


def test_last_stride() -> None:
    image = torch.randn(2, 3, 64, 32)
    assert TimmBackbone("resnet18", (64, 32), last_stride=1).eval()(image, CAMID).grid == (4, 2)


def test_unknown_model_suggests_one() -> None:
    with pytest.raises(ValueError, match=r"timm has no 'resnet5'.*did you mean"):
        TimmBackbone("resnet5", (64, 32))


def test_weights_of_timm_load_by_name(tmp_path: Path) -> None:
    source = TimmBackbone("test_resnet", (64, 32))
    state = {name.removeprefix("net."): value for name, value in source.state_dict().items()}
    save_weights(tmp_path / "timm.safetensors", state | {"fc.weight": torch.zeros(3)}, {})
    target = TimmBackbone("test_resnet", (64, 32))
    report = load_backbone_weights(target, tmp_path / "timm.safetensors")
    assert report.unexpected == ("fc.weight",)
    assert not report.missing
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


def test_bnneck_head() -> None:
    backbone = TimmBackbone("test_resnet", (64, 32))
    model = ReIDModel(backbone, BNNeckHead(backbone))
    assert (model.num_parts, model.num_cameras) == (0, 0)
    found = model(torch.randn(2, 3, 64, 32), CAMID)
    torch.testing.assert_close(found.global_feat.norm(dim=1), torch.ones(2))
    assert found.part_feats.shape == (2, 0, backbone.embed_dim)
    assert not torch.allclose(found.pre_neck, found.post_neck)
    assert not model.head.neck.bias.requires_grad


def test_neck_of_one_image_uses_running_statistics() -> None:
    neck = Neck(4).train()
    neck(torch.randn(8, 4) + 3)
    before = neck.running_mean.clone()
    feature = torch.randn(1, 4)
    found = neck(feature)
    assert torch.equal(neck.running_mean, before)
    torch.testing.assert_close(found, neck.eval()(feature))


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


def test_position_embedding_that_is_no_grid() -> None:
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
