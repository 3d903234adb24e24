from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from reid.modeling.backbones import TimmBackbone
from reid.modeling.heads import BNNeckHead, Neck
from reid.modeling.ibn import IBN
from reid.modeling.model import ReIDModel
from reid.modeling.weights import load_backbone_weights, load_weights, save_weights
from reid.structures import Batch

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
        tokens, found, *_ = backbone(Batch.of(torch.randn(2, 3, *size), CAMID))
    assert found == grid
    assert tokens.shape == (2, 1 + grid[0] * grid[1], backbone.embed_dim)


def test_pooling_of_a_map() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 64, 64)
    tokens = {}
    for pool in ("avg", "max", "gem"):
        torch.manual_seed(1)
        backbone = TimmBackbone("test_resnet", (64, 64), pool=pool).eval()
        tokens[pool] = backbone(Batch.of(image, CAMID)).tokens.detach()
    patches = tokens["avg"][:, 1:]
    torch.testing.assert_close(tokens["avg"][:, 0], patches.mean(1))
    torch.testing.assert_close(tokens["max"][:, 0], patches.amax(1))
    gem = patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
    torch.testing.assert_close(tokens["gem"][:, 0], gem)


def test_last_stride() -> None:
    image = torch.randn(2, 3, 64, 32)
    backbone = TimmBackbone("resnet50", (64, 32), last_stride=1).eval()
    found = backbone(Batch.of(image, CAMID))
    assert found.grid == (4, 2)
    plain = TimmBackbone("resnet50", (64, 32)).eval()
    plain.load_state_dict(backbone.state_dict())
    block = plain.net.layer4[0]
    block.conv2.stride = block.downsample[0].stride = (1, 1)  # all that the baselines change
    torch.testing.assert_close(found.tokens, plain(Batch.of(image, CAMID)).tokens)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ibn_keeps_the_memory_format(layout: torch.memory_format) -> None:
    ibn = IBN(6)
    for parameter in ibn.parameters():
        torch.nn.init.normal_(parameter)
    feature = torch.randn(2, 6, 5, 4).contiguous(memory_format=layout)

    found = ibn(feature)

    assert found.is_contiguous(memory_format=layout)
    first, second = feature.contiguous().chunk(2, 1)
    expected = torch.cat((ibn.IN(first.contiguous()), ibn.BN(second.contiguous())), 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ibn_keeps_half_precision_on_a_gpu() -> None:
    feature = torch.randn(2, 6, 5, 4, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert IBN(6).cuda()(feature).dtype == torch.bfloat16


def test_ibn_resnet_takes_the_published_names(tmp_path: Path) -> None:
    backbone = TimmBackbone("resnet18", (64, 32), norm="ibn", stem_activation=False)
    names = set(backbone.state_dict())
    for stage in (1, 2, 3):
        assert f"net.layer{stage}.0.bn1.IN.weight" in names
        assert f"net.layer{stage}.1.bn1.BN.running_mean" in names
    assert "net.layer4.0.bn1.running_mean" in names
    state = {name.removeprefix("net."): value + 1 for name, value in backbone.state_dict().items()}
    save_weights(tmp_path / "ibn.safetensors", state, {})
    report = load_backbone_weights(backbone, tmp_path / "ibn.safetensors")
    assert not report.missing
    assert backbone(Batch.of(torch.randn(2, 3, 64, 32), CAMID)).tokens.shape == (2, 3, 512)


def test_without_the_first_activation_values_stay_negative() -> None:
    seen = {}
    for active in (True, False):
        backbone = TimmBackbone("test_resnet", (64, 32), stem_activation=active)
        backbone.net.act1.register_forward_hook(
            lambda *args, active=active: seen.update({active: args[2].min()})
        )
        backbone(Batch.of(torch.randn(2, 3, 64, 32), CAMID))
    assert seen[True] == 0 > seen[False]


def test_options_for_resnets_alone() -> None:
    with pytest.raises(ValueError, match="norm: ibn needs a plain ResNet of timm"):
        TimmBackbone("test_vit", (160, 160), norm="ibn")
    with pytest.raises(ValueError, match="stem_activation: 'test_vit' has none"):
        TimmBackbone("test_vit", (160, 160), stem_activation=False)
    with pytest.raises(ValueError, match="timm has no weights of IBN networks"):
        TimmBackbone("resnet18", (64, 32), pretrained=True, norm="ibn")


def test_options_reach_the_model() -> None:
    narrow = TimmBackbone("resnet18", (64, 32), options={"channels": [8, 16, 24, 32]})
    assert narrow.embed_dim == 32
    assert narrow(Batch.of(torch.randn(2, 3, 64, 32), CAMID)).tokens.shape == (2, 3, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel": [8]}, "'resnet18' does not take an option: .*'channel'"),
        ({"channels": 8}, "'resnet18' does not take an option"),
        ({"checkpoint_path": "evil.pth"}, "options: checkpoint_path is not the model's"),
        ({"pretrained": True}, "options: pretrained is not the model's"),
        ({"output_stride": 8}, "options: output_stride is not the model's, or set by"),
        ({"in_chans": 1}, "options: in_chans is not the model's"),
        (
            {"norm_layer": "no"},
            r"options: 'resnet18' cannot be made with .*no.* \(KeyError: 'no'\)",
        ),
        ({"channels": [8, 8, 8, -4]}, "cannot be made with .*negative dimension"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmBackbone("resnet18", (64, 32), last_stride=1, options=options)


def test_weights_of_timm_that_do_not_fit_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Error(s) in loading state_dict for ResNet:\n\tsize mismatch")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match=r"do not fit a network with the options .*set PRETRAINED"):
        TimmBackbone("resnet18", (64, 32), pretrained=True, options={"channels": [8, 8, 8, 8]})


def test_unknown_model_suggests_one() -> None:
    with pytest.raises(ValueError, match=r"timm has no 'resnet5'.*did you mean"):
        TimmBackbone("resnet5", (64, 32))


def test_weights_of_timm_need_the_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(model: str, pretrained: bool, **_: object) -> None:
        asked.append((model, pretrained))
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ValueError, match=r"'resnet18\.a1_in1k' cannot be downloaded \(no net"):
        TimmBackbone("resnet18.a1_in1k", (64, 32), pretrained=True)
    assert asked == [("resnet18.a1_in1k", True)]


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
    found = model(Batch.of(torch.randn(2, 3, 64, 32), CAMID))
    torch.testing.assert_close(found.test.norm(dim=1), torch.ones(2))
    assert found.unit[:, 1:].shape == (2, 0, backbone.embed_dim)
    assert not torch.allclose(found.pre[:, 0], found.post[:, 0])
    assert not model.head.neck.bias.requires_grad


def test_embedding_before_the_neck() -> None:
    backbone = TimmBackbone("test_resnet", (64, 32))
    before = ReIDModel(backbone, BNNeckHead(backbone, neck_feature="before"))
    after = ReIDModel(backbone, BNNeckHead(backbone))
    nn.init.uniform_(before.head.neck.running_mean)
    load_weights(after, before.state_dict())
    image = torch.randn(2, 3, 64, 32)
    batch = Batch.of(image, CAMID)
    one, other = before.eval()(batch), after.eval()(batch)
    torch.testing.assert_close(one.test, F.normalize(one.pre[:, 0], dim=1))
    torch.testing.assert_close(other.test, F.normalize(other.post[:, 0], dim=1))
    torch.testing.assert_close(one.post[:, 0], other.post[:, 0])
    assert not torch.allclose(one.test, other.test)


def test_neck_of_one_image_uses_running_statistics() -> None:
    neck = Neck(4).train()
    neck(torch.randn(8, 4) + 3)
    before = neck.running_mean.clone()
    feature = torch.randn(1, 4)
    found = neck(feature)
    assert torch.equal(neck.running_mean, before)
    torch.testing.assert_close(found, neck.eval()(feature))
