"""ABD-Net: attention, network, losses and penalties against the authors' numbers; whole runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from reid.modeling.attention import ChannelAttention, PositionAttention, put_attention
from reid.modeling.backbones import TimmBackbone
from reid.modeling.formats import use_our_names
from reid.modeling.losses import Criterion, CrossEntropy, Triplet
from reid.modeling.maps import find_weights, recorded_maps
from reid.modeling.model import ReIDModel
from reid.modeling.weights import load_weights
from reid.projects.abdnet import ABDHead, FeatureOrthogonality, WeightOrthogonality
from reid.projects.abdnet.orthogonality import _as_rows
from reid.structures import Batch, Embeddings

CONFIGS = Path(__file__).parents[1] / "configs"
POSITIONS = {  # the authors' names of the maps, ours and the factors
    "intermediate": ("backbone.net.layer1", 0.01),
    "before": ("head.identity", 1.0),
    "cam": ("head.channels", 1.0),
    "pam": ("head.positions", 1.0),
    "after": ("head.merge", 1.0),
}


def read(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape, what
    error = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, f"{what}: {error}"


def relative(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{what}: {error}"


def small_backbone(stem: int = 2) -> TimmBackbone:
    """A ResNet with one bottleneck in each stage and the channels of a 32nd of ResNet-50."""
    backbone = TimmBackbone("test_resnet", (64, 32))
    net = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=0, output_stride=16,
                 channels=tuple(stem * 2**stage for stage in range(4)))  # fmt: skip
    net.layer4[0].conv2.dilation, net.layer4[0].conv2.padding = (1, 1), (1, 1)
    net.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
    net.bn1 = nn.BatchNorm2d(stem)
    block = net.layer1[0]
    block.conv1 = nn.Conv2d(stem, stem, 1, bias=False)
    block.downsample[0] = nn.Conv2d(stem, 4 * stem, 1, bias=False)
    put_attention(net, {"layer1": "channels"})
    backbone.net, backbone.embed_dim = net, net.num_features
    return backbone


def attention_of(a: Mapping[str, Tensor]) -> list[str]:
    flags = {"channels": "use_cam", "positions": "use_pam"}
    return [kind for kind, flag in flags.items() if int(a[flag])]


def authors_state(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("state."): v for name, v in a.items() if name.startswith("state.")}


def authors_model(a: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> ReIDModel:
    backbone = small_backbone()
    state = authors_state(a)
    head = ABDHead(
        backbone, 16, int(a["parts"]), attention_of(a), bool(a["use_head"]), dropout=0.0,
        channel_dropout=0.0,
    )  # fmt: skip
    model = ReIDModel(backbone, head)
    report = load_weights(model, use_our_names(state))
    assert not (report.missing or report.unexpected), report
    return model.to(dtype)


def authors_criterion(a: Mapping[str, Tensor]) -> Criterion:
    """Cross entropy with the authors' classifiers, and the triplet loss."""
    parts, state = int(a["parts"]), authors_state(a)
    classes = len(state["branches.0.1.classifier.weight"])
    loss = CrossEntropy(16, classes, smoothing=0.1, banks="all", num_parts=parts, bias=True)
    names = ["branches.0.1.classifier", *(f"branches.1.1.classifiers.{k}" for k in range(parts))]
    for layer, name in zip(loss._classifiers(), names, strict=True):
        layer.load_state_dict({kind: state[f"{name}.{kind}"] for kind in ("weight", "bias")})
    triplet = Triplet(float(a["margin"]), banks="all", num_parts=parts)
    criterion = Criterion([loss, triplet], [1.0, float(a["lambda_htri"])])
    for each in criterion:
        each.cluster = a["label"].long()
    return criterion


def our_parameter(model: ReIDModel, name: str) -> Tensor:
    """A parameter by the authors' name."""
    (ours,) = use_our_names({
        "common_branch.backbone1.0.weight": torch.zeros(1), "branches.0.1.fc.0.weight": torch.zeros(1),
        name: torch.ones(1),
    }).keys() - {"backbone.net.conv1.weight", "head.global_fc.0.weight"} or {
        {"common": "backbone.net.conv1.weight", "branches": "head.global_fc.0.weight"}[name.split("_")[0].split(".")[0]]
    }  # fmt: skip
    return model.get_parameter(ours)


def network_files(oracle_dir: Path) -> list[Path]:
    files = [path for path in sorted(oracle_dir.glob("abdnet_*.npz")) if "attention" not in path.stem]
    assert files
    return files


@pytest.mark.oracle
def test_attention_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("abdnet_attention*.npz"))
    assert files
    for path in files:
        a = read(path)
        for kind, module in (("cam", ChannelAttention(16)), ("pam", PositionAttention(16))):
            start = f"{kind}.state."
            names = [name for name in a if name.startswith(start)]
            module.load_state_dict(
                {name.removeprefix(start).replace("_conv", ""): a[name] for name in names}
            )
            given = a["input"].clone().requires_grad_()
            found = module(given)
            close(found.detach(), a[f"{kind}.output"], f"{path} {kind}", 1e-5)
            (found * a[f"{kind}.grad_out"]).sum().backward()
            assert given.grad is not None
            close(given.grad, a[f"{kind}.grad_input"], f"{path} {kind} gradient", 1e-5)
            assert module.gamma.grad is not None
            relative(module.gamma.grad, a[f"{kind}.grad_gamma"], f"{path} {kind} gamma", 1e-5)


@pytest.mark.oracle
def test_outputs_losses_penalties_and_gradients_of_the_authors(oracle_dir: Path) -> None:
    for path in network_files(oracle_dir):
        a = read(path)
        model, criterion = authors_model(a), authors_criterion(a)
        batch = Batch.of(a["image"].float())
        with torch.no_grad():
            found = model.eval()(batch)
        close(found.pre.flatten(1), a["eval_feature"], f"{path} test feature")
        unit = nn.functional.normalize(a["eval_feature"])
        close(found.test, unit, f"{path} test feature of length 1")
        shown = {position: POSITIONS[position] for position in POSITIONS if f"of_term.{position}" in a}
        features = FeatureOrthogonality(dict(shown.values()), float(a["of_beta"]))
        filters = WeightOrthogonality(beta=float(a["ow_beta"]))
        model.train()
        with recorded_maps(model, features.maps) as maps:
            found = model(batch)
        close(found.pre.flatten(1).detach(), a["train_feature"], f"{path} features")
        pieces, starts = {}, {}
        for position, (name, factor) in shown.items():
            theirs = [a[key] for key in sorted(a) if key.startswith(f"map.{position}.")]
            pieces[name] = _as_rows(name, maps[name])
            expected = torch.stack(theirs, 1).flatten(3)
            close(pieces[name].detach(), expected, f"{path} map {position}")
            keys = [key for key in sorted(a) if key.startswith(f"of_start.{position}.")]
            starts[name] = torch.stack([a[key] for key in keys], 2)
            alone = FeatureOrthogonality({name: factor}, float(a["of_beta"]))
            term = alone.penalty({name: pieces[name].detach()}, {name: starts[name]})
            relative(term, a[f"of_term.{position}"], f"{path} penalty {position}")
        losses = criterion({("student", 0): found}, batch)
        with torch.no_grad():
            classifiers = criterion.losses[0]._classifiers()
            scores = [layer(bank) for layer, bank in zip(classifiers, found.post.unbind(1), strict=True)]
        close(torch.stack(scores), a["train_logits"], f"{path} scores")
        relative(losses["cross_entropy"].detach(), a["loss_xent"], f"{path} cross entropy")
        hinge = losses["triplet"].detach() / float(a["lambda_htri"])
        relative(hinge, a["loss_htri"], f"{path} triplet")
        totals = {
            "loss": torch.stack([*losses.values()]).sum(),
            "of": features.penalty(pieces, starts),
            "ow": filters.penalty(model.get_parameter("backbone.net.conv1.weight"), a["ow_start"]),
        }
        relative(totals["loss"].detach(), a["loss"], f"{path} loss")
        for kind in ("of", "ow"):
            relative(totals[kind].detach(), a[f"{kind}_penalty"], f"{path} {kind}")
        for kind, total in totals.items():
            model.zero_grad()
            total.backward(retain_graph=True)
            for name, expected in a.items():
                if name.startswith(f"grad_{kind}."):
                    gradient = our_parameter(model, name.partition(".")[2]).grad
                    assert gradient is not None, name
                    relative(gradient, expected, f"{path} {name}", 1e-3)
