from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid.modeling.convert import convert_weights, missing_names
from reid.modeling.heads import BNNeckHead
from reid.modeling.model import ReIDModel
from reid.modeling.vit import ViT
from reid.modeling.weights import (
    WeightsError,
    load_backbone_weights,
    load_weights,
    read_checkpoint,
)
from reid.structures import Batch

SMALL: dict[str, Any] = {"stem_channels": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def model() -> ReIDModel:
    backbone = ViT((32, 16), num_cameras=3, stem="ibn", camera_embedding=True, **SMALL)
    return ReIDModel(backbone, BNNeckHead(backbone)).eval()


def transreid(net: ReIDModel) -> dict[str, Tensor]:
    names = {"backbone.net.": "base.", "backbone.camera_embed": "base.sie_embed",
             "head.neck.": "bottleneck."}  # fmt: skip
    state = {"classifier.weight": torch.ones(7, 24)}
    for name, value in net.state_dict().items():
        ours, theirs = next(pair for pair in names.items() if name.startswith(pair[0]))
        state[theirs + name.removeprefix(ours)] = value
    return state


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "transformer_120.pth"
    torch.save(transreid(model()), path)
    return path


def test_the_output_says_where_it_comes_from(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "ours.safetensors"
    report = convert_weights(source, output, url="https://example.org/x", image_size=(256, 128))
    state, metadata = read_checkpoint(output)
    assert metadata == {
        "format": "transreid",
        "source": "transformer_120.pth",
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "part": "model",
        "url": "https://example.org/x",
        "pixel_mean": "[0.5, 0.5, 0.5]",
        "pixel_std": "[0.5, 0.5, 0.5]",
        "image_size": "[256, 128]",
        "num_cameras": "3",
    }
    text = str(report)
    for part in (
        "format      transreid",
        "base.blocks.*.attn.qkv.weight -> backbone.net.blocks.*.attn.qkv.weight",
        "classifier.weight (classifier of the training identities)",
        "unmapped    0",
    ):
        assert part in text
    target = model()
    load_weights(target, state)
    image, camid = torch.randn(2, 3, 32, 16), torch.tensor([0, 2])
    expected = model()
    load_weights(expected, read_checkpoint(source)[0])
    assert torch.equal(target(Batch.of(image, camid)).test, expected(Batch.of(image, camid)).test)


def test_a_backbone_to_start_from(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "start.safetensors"
    convert_weights(source, output, part="backbone", half=True)
    state, metadata = read_checkpoint(output)
    assert all(name.startswith("backbone.net.") for name in state)
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
    assert metadata["part"] == "backbone"
    assert "num_cameras" not in metadata
    convert_weights(source, tmp_path / "whole.safetensors")
    again = convert_weights(tmp_path / "whole.safetensors", output, part="backbone")
    assert (again.written.name, again.missing) == ("reid", ())
    assert again.metadata["pixel_mean"] == "[0.5, 0.5, 0.5]"
    assert "num_cameras" not in again.metadata
    report = load_backbone_weights(
        ViT((64, 32), num_cameras=5, stem="ibn", camera_embedding=True, **SMALL), output
    )
    assert report.missing == ("camera_embed",)
    assert json.loads(report.metadata["pixel_mean"]) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"base.more": torch.ones(1)}, r"1 unmapped \(base\.more\)"),
        (
            lambda s: {k: v for k, v in s.items() if k != "base.blocks.1.mlp.fc2.bias"},
            r"1 missing \(backbone\.net\.blocks\.1\.mlp\.fc2\.bias\)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("base.blocks.1.")},
            r"12 missing",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "base.pos_embed"}, r"net\.pos_embed"),
    ],
)
def test_an_incomplete_mapping_is_an_error(tmp_path: Path, change: Any, message: str) -> None:
    source, output = tmp_path / "m.pth", tmp_path / "ours.safetensors"
    torch.save(change(transreid(model())), source)
    with pytest.raises(WeightsError, match=message):
        convert_weights(source, output)
    assert not output.exists()
    report = convert_weights(source, output, partial=True)
    assert report.unmapped + report.missing
    assert output.exists()


def test_errors_leave_no_file(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "ours.safetensors"
    with pytest.raises(WeightsError, match=r"expected one of .*reid.*did you mean 'transreid'"):
        convert_weights(source, output, written_as="transried")
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"of no known format; the file has encoder\.weight"):
        convert_weights(tmp_path / "odd.pth", output)
    with pytest.raises(WeightsError, match="nothing to write"):
        convert_weights(source, output, drop=["*"])
    torch.save(transreid(model()) | {"base.norm.bias": torch.full((24,), torch.nan)}, source)
    with pytest.raises(WeightsError, match=r"not finite: backbone\.net\.norm\.bias"):
        convert_weights(source, output)
    torch.save(transreid(model()) | {"base.norm.bias": torch.full((24,), 1e5)}, source)
    with pytest.raises(WeightsError, match=r"not finite in half precision: backbone\.net\.norm"):
        convert_weights(source, output, half=True)
    assert not output.exists()


def test_statistics_of_the_file_go_to_the_metadata(tmp_path: Path) -> None:
    stages = {
        f"backbone.layer{stage}.0.{name}": torch.ones(1)
        for stage in (1, 2, 3, 4)
        for name in ("conv1.weight", "conv2.weight")
    }
    norm = {f"bn1.{name}": torch.ones(1) for name in ("weight", "bias", "running_mean",
                                                      "running_var")}  # fmt: skip
    state = stages | {f"backbone.{name}": value for name, value in norm.items()}
    state |= {"backbone.conv1.weight": torch.ones(1), "heads.weight": torch.ones(1)}
    state |= {"pixel_mean": torch.full((1, 3, 1, 1), 127.5), "pixel_std": torch.full((3,), 51.0)}
    torch.save({"model": state}, tmp_path / "market.pth")
    report = convert_weights(tmp_path / "market.pth", tmp_path / "o.safetensors")
    assert report.metadata["pixel_mean"] == "[0.5, 0.5, 0.5]"
    assert report.metadata["pixel_std"] == "[0.2, 0.2, 0.2]"
    assert "rounds sizes up" in str(report)
    statistics = (0.4, 0.4, 0.4), (0.2, 0.2, 0.2)
    report = convert_weights(
        tmp_path / "market.pth", tmp_path / "o.safetensors", statistics=statistics
    )
    assert report.metadata["pixel_mean"] == "[0.4, 0.4, 0.4]"


def test_numbered_layers_have_no_gaps() -> None:
    state = {f"backbone.net.blocks.{i}.{n}": torch.ones(1) for i in (0, 2) for n in ("a", "b")}
    del state["backbone.net.blocks.2.b"]
    assert missing_names(state) == [
        "backbone.net.blocks.1.a", "backbone.net.blocks.1.b", "backbone.net.blocks.2.b",
    ]  # fmt: skip


def test_missing_names_of_a_layer_with_a_huge_number() -> None:
    state = {f"backbone.net.blocks.{10**15}.norm1.weight": torch.zeros(2)}
    assert "backbone.net.blocks.3.norm1.weight" in missing_names(state)


def test_names_that_no_format_knows_can_be_dropped(source: Path, tmp_path: Path) -> None:
    state = transreid(model())
    torch.save(state | {"1047": torch.ones(1)}, source)
    output = tmp_path / "ours.safetensors"
    with pytest.raises(WeightsError, match=r"1 unmapped \(1047\).*leave names out with --drop"):
        convert_weights(source, output)
    report = convert_weights(source, output, drop=["1047"])
    assert report.left_out["1047"] == "not wanted"
    assert not report.unmapped
