"""Fake checkpoints with each project's names, converted to ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reid.modeling import formats
from reid.modeling.backbones import TimmBackbone
from reid.modeling.formats import (
    Format,
    Rule,
    find_format,
    register_format,
    translate,
    use_our_names,
)
from reid.modeling.heads import BNNeckHead
from reid.modeling.model import ReIDModel
from reid.modeling.vit import ViT
from reid.modeling.weights import load_weights
from reid.structures import Batch

CAMID = torch.tensor([0, 2])
State = dict[str, Tensor]


def vit(stem: Any = "ibn", **options: Any) -> ReIDModel:
    backbone = ViT(
        (32, 16), num_cameras=3, stem=stem, stem_channels=8, embed_dim=24, depth=3, num_heads=3,
        **options,
    )  # fmt: skip
    return scrambled(ReIDModel(backbone, BNNeckHead(backbone)))


def resnet(**options: Any) -> ReIDModel:
    backbone = TimmBackbone("resnet18", (32, 16), **options)
    return scrambled(ReIDModel(backbone, BNNeckHead(backbone)))


def scrambled(model: ReIDModel) -> ReIDModel:
    """Different values in each tensor, so that a swap shows."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * (1 if "running_var" in name else 0.2) + 0.1)
    return model.eval()


def renamed(model: ReIDModel, *pairs: tuple[str, str]) -> State:
    state = {}
    for name, value in model.state_dict().items():
        old = next(old for ours, old in pairs if name.startswith(ours))
        ours = next(ours for ours, _ in pairs if name.startswith(ours))
        state[old + name.removeprefix(ours)] = value
    return state


def transreid(model: ReIDModel) -> State:
    return renamed(
        model,
        ("backbone.camera_embed", "base.sie_embed"),
        ("backbone.net.", "base."),
        ("head.neck.", "bottleneck."),
    ) | {"base.fc.weight": torch.ones(5, 24), "classifier.weight": torch.ones(7, 24)}


def local_features(model: ReIDModel) -> State:
    state = transreid(model)
    for name in list(state):
        if name.startswith("base.blocks.2."):
            inner = name.removeprefix("base.blocks.2.")
            state[f"b1.0.{inner}"] = state[name]
            state[f"b2.0.{inner}"] = torch.zeros_like(state[name])
            state[name] = torch.zeros_like(state[name])
        if name.startswith("base.norm."):
            state[f"b1.1.{name.removeprefix('base.norm.')}"] = state[name]
            state[name] = torch.zeros_like(state[name])
        if name.startswith("bottleneck."):
            state[f"bottleneck_1.{name.removeprefix('bottleneck.')}"] = state[name]
    return state | {"classifier_1.weight": torch.ones(7, 24)}


CASES = {
    "transreid": lambda: (vit(camera_embedding=True), transreid),
    "transreid-jpm": lambda: (vit("patches", camera_embedding=True), local_features),
    "transreid-ssl-usl": lambda: (
        vit(),
        lambda model: renamed(model, ("backbone.net.", ""), ("head.neck.", "bottleneck.")),
    ),
    "strong-baseline": lambda: (
        resnet(),
        lambda model: (
            renamed(model, ("backbone.net.", "base."), ("head.neck.", "bottleneck."))
            | {"classifier.weight": torch.ones(7, 512)}
        ),
    ),
    "fast-reid": lambda: (
        resnet(pool="gem"),
        lambda model: (
            renamed(
                model,
                ("backbone.net.", "backbone."),
                ("head.neck.", "heads.bottleneck.0."),
                ("backbone.exponent", "heads.pool_layer.p"),
            )
            | {
                "heads.pool_layer.p": model.backbone.exponent.detach().reshape(1),
                "heads.weight": torch.ones(7, 512),
                "pixel_mean": torch.full((1, 3, 1, 1), 127.5),
                "pixel_std": torch.full((1, 3, 1, 1), 51.0),
            }
        ),
    ),
    "reid": lambda: (vit(), lambda model: model.state_dict()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_whole_model_gives_the_same_features(name: str) -> None:
    torch.manual_seed(0)
    source, foreign = CASES[name]()
    state = foreign(source)
    found = find_format(state)
    assert found is not None
    assert found.name == name
    translation = translate(state, found)
    assert not translation.unmapped
    assert len(state) == len(translation.renamed) + len(translation.left_out)
    torch.manual_seed(1)
    target, _ = CASES[name]()
    report = load_weights(target, translation.state)
    assert not report.missing
    assert set(report.unexpected) == set(translation.optional)
    image = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        batch = Batch.of(image, CAMID)
        assert torch.equal(target(batch).post, source(batch).post)
        assert torch.equal(target(batch).test, source(batch).test)


@pytest.mark.parametrize(
    ("name", "prefix", "more"),
    [
        ("vit", "", {"fc.weight": torch.ones(5, 24)}),
        ("vit", "", {"head.weight": torch.ones(5, 24), "head.bias": torch.ones(5)}),
        ("dino", "backbone.", {"head.mlp.0.weight": torch.ones(8, 24), "head.last_layer.weight_g":
                               torch.ones(8, 1), "head.last_layer.weight_v": torch.ones(8, 8)}),
        ("resnet", "", {"fc.weight": torch.ones(5, 512), "fc.bias": torch.ones(5)}),
        ("resnet", "", {"classifier.weight": torch.ones(5, 512), "classifier.bias":
                        torch.ones(5)}),
        ("resnet", "", {"projection_head.0.weight": torch.ones(1), "prototypes.weight":
                        torch.ones(1)}),
        ("self-supervised", "encoder_q.", {
            "encoder_q.fc.0.weight": torch.ones(1), "encoder_k.conv1.weight": torch.ones(1),
            "queue": torch.ones(1), "queue_ptr": torch.zeros(1),
        }),
        ("self-supervised", "base_encoder.", {
            "base_encoder.fc.1.running_mean": torch.ones(1), "predictor.0.weight": torch.ones(1),
            "momentum_encoder.conv1.weight": torch.ones(1),
        }),
        ("self-supervised vit", "base_encoder.", {
            "base_encoder.head.0.weight": torch.ones(1), "momentum_encoder.cls_token":
            torch.ones(1),
        }),
        ("self-supervised", "encoder.", {
            "encoder.fc.0.weight": torch.ones(1), "predictor.0.weight": torch.ones(1),
        }),
        ("self-supervised", "backbone.", {"projector.0.weight": torch.ones(1), "bn.running_mean":
                                          torch.ones(1)}),
    ],
    ids=["TransReID-SSL", "timm", "DINO", "torchvision", "torchreid", "SwAV", "MoCo", "MoCo v3",
         "MoCo v3 ViT", "SimSiam", "Barlow Twins"],
)  # fmt: skip
def test_all_tensors_of_a_backbone_are_mapped(name: str, prefix: str, more: State) -> None:
    name, _, network = name.partition(" ")
    transformer = name in ("vit", "dino") or network
    backbone = (vit() if transformer else resnet()).backbone
    state = {prefix + n.removeprefix("net."): v for n, v in backbone.state_dict().items()} | more
    found = find_format(state)
    assert found is not None
    assert found.name == name
    translation = translate(state, found)
    assert not translation.unmapped
    assert set(translation.left_out) == set(more)
    assert translation.state.keys() == {f"backbone.{n}" for n in backbone.state_dict()}


def test_unknown_names_are_unmapped() -> None:
    state = transreid(vit()) | {"base.extra.weight": torch.ones(1)}
    assert translate(state, find_format(state) or formats.FORMATS[0]).unmapped == (
        "base.extra.weight",
    )
    assert find_format({"encoder.weight": torch.ones(1)}) is None


def test_two_tensors_for_one_name_are_an_error() -> None:
    twice = Format("twice", "nobody", (Rule(r"[ab]", "backbone.net.x"),), has=("a",))
    with pytest.raises(ValueError, match=r"b and another tensor both become backbone\.net\.x"):
        translate({"a": torch.ones(1), "b": torch.ones(1)}, twice)


def test_a_plug_in_adds_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS])
    added = Format("mine", "me", (Rule(r"my\.(.+)", r"backbone.\1"),), has=(r"my\.",))
    register_format(added)
    register_format(added)
    assert [known.name for known in formats.FORMATS].count("mine") == 1
    assert find_format({"my.net.x": torch.ones(1)}) is added


def test_left_out_names_have_a_reason() -> None:
    source = vit("patches", camera_embedding=True)
    state = use_our_names(local_features(source))
    report = load_weights(source, state)
    assert not report.unexpected
    copied = [name for name in report.left_out if name.startswith(("base.blocks.2.", "base.norm."))]
    assert len(copied) == 14
    text = str(report)
    assert "left out    14: base.blocks.2.norm1.weight, " in text
    assert text.count("(the branches' copies replace it)") == 1
    assert "(classifier of the training identities)" in text
    assert "unexpected  0" in text


def test_a_distilled_deit_loses_its_second_token() -> None:
    torch.manual_seed(0)
    model = vit("patches")
    ours = model.backbone.net.state_dict()
    position = ours["pos_embed"]
    theirs = ours | {
        "dist_token": torch.ones(1, 1, 24),
        "head_dist.weight": torch.ones(5, 24),
        "pos_embed": torch.cat((position[:, :1], torch.ones(1, 1, 24), position[:, 1:]), 1),
    }
    state = use_our_names(theirs)
    assert torch.equal(state["backbone.net.pos_embed"], position)
    assert state.left_out["dist_token"] == "token of the distillation"
