"""CLIP's image encoder: timm's network, OpenAI's names, the authors' numbers of PCL-CLIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from reid.modeling import clip
from reid.modeling.clip import CLIPViT
from reid.modeling.convert import convert_weights
from reid.modeling.formats import find_format
from reid.modeling.vit import resize_position_embedding
from reid.modeling.weights import WeightsError, load_backbone_weights, load_weights, save_weights
from reid.structures import Batch

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "projection": 16}
TIMM: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 16}


def timms(**options: Any) -> Any:
    torch.manual_seed(0)
    name = clip.PRETRAINED.split(".")[0]
    return timm.create_model(name, **(TIMM | options))


def openai_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of timm's network as OpenAI's file has it, with a bit of the text encoder."""
    names = {
        "patch_embed.proj.": "conv1.", "norm_pre.": "ln_pre.", "blocks.": "transformer.resblocks.",
        ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".attn.qkv.": ".attn.in_proj_",
        ".attn.proj.": ".attn.out_proj.", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.",
        "cls_token": "class_embedding", "pos_embed": "positional_embedding",
    }  # fmt: skip
    found = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name.startswith("norm."):
            name = f"ln_post.{name[5:]}"
        found[f"visual.{name}"] = tensor
    found["visual.proj"] = found.pop("visual.head.weight").T.contiguous()
    del found["visual.head.bias"]
    found["visual.class_embedding"] = found["visual.class_embedding"][0, 0]
    found["visual.positional_embedding"] = found["visual.positional_embedding"][0]
    text = {"positional_embedding": torch.ones(3, 2), "logit_scale": torch.tensor(1.0),
            "transformer.resblocks.0.ln_1.weight": torch.ones(2)}  # fmt: skip
    return found | text


@pytest.mark.parametrize("openai", [False, True])
def test_weights_of_timm_and_of_openai_give_timms_features(tmp_path: Path, openai: bool) -> None:
    source = timms(img_size=(64, 32)).eval()
    state = dict(source.state_dict())
    state["head.bias"].zero_()
    if openai:
        state = openai_names({name: tensor.half() for name, tensor in state.items()})
    save_weights(tmp_path / "clip.safetensors", state, {})
    backbone = CLIPViT((64, 32), **SMALL).eval()
    report = load_backbone_weights(backbone, tmp_path / "clip.safetensors")
    assert not report.missing
    assert not report.unexpected
    assert not report.resized
    image = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = backbone(Batch.of(image)).tokens
        tolerance = 5e-3 if openai else 1e-6
        torch.testing.assert_close(
            tokens, source.forward_features(image), atol=tolerance, rtol=tolerance
        )
        torch.testing.assert_close(
            backbone.split_projection()(tokens[:, 0]), source(image), atol=tolerance, rtol=tolerance
        )


def test_a_file_of_openai_is_converted_whole(tmp_path: Path) -> None:
    state = openai_names(dict(timms().state_dict()))
    save_weights(tmp_path / "clip.safetensors", state, {})
    found = convert_weights(tmp_path / "clip.safetensors", tmp_path / "ours.safetensors")
    assert (found.written.name, found.unmapped, found.missing) == ("clip", (), ())
    assert {*found.left_out.values()} == {"text encoder"}
    backbone = CLIPViT((64, 32), **SMALL)
    assert not load_backbone_weights(backbone, tmp_path / "ours.safetensors").missing
    del state["visual.ln_pre.bias"]
    save_weights(tmp_path / "clip.safetensors", state, {})
    with pytest.raises(WeightsError, match=r"1 missing \(backbone\.net\.norm_pre\.bias\)"):
        convert_weights(tmp_path / "clip.safetensors", tmp_path / "ours.safetensors")


def test_the_position_embedding_of_the_square_is_resized_as_the_authors_do(tmp_path: Path) -> None:
    source = timms()
    save_weights(tmp_path / "clip.safetensors", source.state_dict(), {})
    backbone = CLIPViT((256, 128), **SMALL)
    report = load_backbone_weights(backbone, tmp_path / "clip.safetensors")
    assert [entry.split()[0] for entry in report.resized] == ["net.pos_embed"]
    expected = resize_position_embedding(source.pos_embed.detach(), (16, 8), (14, 14))
    assert backbone.net.pos_embed.equal(expected)


def test_a_count_of_positions_without_a_grid_is_an_error(tmp_path: Path) -> None:
    state = dict(timms().state_dict())
    state["pos_embed"] = torch.zeros(1, 1 + 190, 24)
    save_weights(tmp_path / "clip.safetensors", state, {})
    with pytest.raises(WeightsError, match="a position embedding of 190 tokens is no grid"):
        load_backbone_weights(CLIPViT((64, 32), **SMALL), tmp_path / "clip.safetensors")


def test_sides_that_patches_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected multiples of the patch size 16"):
        CLIPViT((250, 128), **SMALL)


def test_published_network() -> None:
    with torch.device("meta"):
        backbone = CLIPViT((256, 128))
        named = {name: tuple(p.shape) for name, p in timms(
            embed_dim=768, depth=12, num_heads=12, num_classes=512, img_size=(256, 128)
        ).named_parameters()}  # fmt: skip
    ours = {name.removeprefix("net."): tuple(p.shape) for name, p in backbone.named_parameters()}
    assert ours == {name: shape for name, shape in named.items() if name != "head.bias"}
    assert {m.eps for m in backbone.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert backbone.net.blocks[0].attn.num_heads == 12
    assert type(backbone.net.blocks[0].mlp.act).__name__ == "QuickGELU"
    x = torch.linspace(-4, 4, 9)
    assert backbone.net.blocks[0].mlp.act(x).allclose(x * torch.sigmoid(1.702 * x))


def test_pretrained_takes_timms_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = timms(), []

    def create(name: str, pretrained: bool) -> Any:
        asked.append((name, pretrained))
        return source

    monkeypatch.setattr(clip.timm, "create_model", create)
    backbone = CLIPViT((32, 32), pretrained=True, num_cameras=2, camera_embedding=True, **SMALL)
    assert asked == [("vit_base_patch16_clip_quickgelu_224.openai", True)]
    assert backbone.net.head.weight.equal(source.head.weight)
    assert backbone.net.blocks[1].mlp.fc1.weight.equal(source.blocks[1].mlp.fc1.weight)
    with pytest.raises(WeightsError, match=r"timm's vit_base_patch16_clip_quickgelu_224\.openai"):
        CLIPViT((32, 32), pretrained=True, **{**SMALL, "embed_dim": 48})


def test_weights_that_cannot_be_downloaded_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(clip.timm, "create_model", create)
    with pytest.raises(ValueError, match=r"cannot be downloaded \(no network\); get them elsewhe"):
        CLIPViT((32, 32), pretrained=True, **SMALL)


def test_without_a_projection_there_is_none_to_take() -> None:
    backbone = CLIPViT((32, 32), **{**SMALL, "projection": 0})
    assert not any("head" in name for name in backbone.state_dict())
    with pytest.raises(ValueError, match="the head needs CLIP's projection, got 0"):
        backbone.split_projection()


def oracle(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The numbers of a file, and its image encoder under OpenAI's names."""
    given = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    start = "state.image_encoder."
    state = {f"visual.{k.removeprefix(start)}": v for k, v in given.items() if k.startswith(start)}
    return given, state


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, float(error)


@pytest.mark.oracle
def test_tokens_cameras_and_positions_of_the_authors(
    oracle_dir: Path, tmp_path: Path, load_small_clip: Callable[..., CLIPViT]
) -> None:
    files = sorted(oracle_dir.glob("clipvit_*.npz"))
    assert files
    for path in files:
        given, state = oracle(path)
        image = given["image"].float()
        backbone = load_small_clip(state, image).eval()
        batch = Batch.of(image, given["camid"])
        with torch.no_grad():
            tokens, _, before = backbone(batch)
            close(tokens[:, 0], given["eval_token"])
            close(tokens[:, 1:], given["eval_patch_token"])
            assert before is not None
            close(before[:, 0], given["eval_token_before_last_block"])
            close(backbone.net.head(tokens[:, 0]), given["eval_projection"])
            options = {"num_cameras": 3, "camera_embedding": True,
                       "camera_scale": float(given["camera_weight"])}  # fmt: skip
            with_cameras = load_small_clip(state, image, **options).eval()
            table = {"camera_embed": given["camera_table"][:, None]}
            load_weights(with_cameras, with_cameras.state_dict() | table)
            tokens = with_cameras(batch).tokens
            close(tokens[:, 0], given["eval_token_camera"])
            close(with_cameras.net.head(tokens[:, 0]), given["eval_projection_camera"])
        for grid in ((16, 8), (24, 8), (21, 10)):
            found = resize_position_embedding(given["pos_original"][None], grid)[0]
            close(found, given[f"pos_{grid[0]}x{grid[1]}"])


@pytest.fixture
def load_small_clip(tmp_path: Path) -> Callable[..., CLIPViT]:
    """The small network of the oracles, loaded from a file of OpenAI's names."""

    def load(state: dict[str, Tensor], image: Tensor, **options: Any) -> CLIPViT:
        known = find_format(state)
        assert known is not None
        assert known.name == "clip"
        save_weights(tmp_path / "oracle.safetensors", state, {})
        height, width = image.shape[2:]
        backbone = CLIPViT((height, width), **{**SMALL, "depth": 12, **options})
        load_backbone_weights(backbone, tmp_path / "oracle.safetensors")
        return backbone

    return load
