"""ABD-Net: attention, network, losses and penalties against the authors' numbers; whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from reid.assembly.optimization import build_learning_rate, build_optimization
from reid.config import load_config
from reid.engine.hooks.checkpoints import checkpoint_paths, epoch_of
from reid.modeling.attention import ChannelAttention, PositionAttention, put_attention
from reid.modeling.backbones import TimmBackbone
from reid.modeling.convert import convert_weights
from reid.modeling.formats import FORMATS, translate, use_our_names
from reid.modeling.heads import BNNeckHead
from reid.modeling.losses import Criterion, CrossEntropy, Triplet
from reid.modeling.model import ReIDModel
from reid.modeling.network_outputs import find_weights, recorded_outputs
from reid.modeling.vit import ViT
from reid.modeling.weights import load_weights, read_checkpoint
from reid.projects.abdnet import ABDHead, FeatureOrthogonality, WeightOrthogonality
from reid.projects.abdnet.orthogonality import _as_rows, eigenvalue_gap
from reid.registry import ConfigError
from reid.structures import Batch, Embeddings

FORMATS_BY_NAME = {known.name: known for known in FORMATS}
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


def authors_model(a: Mapping[str, Tensor]) -> ReIDModel:
    backbone = small_backbone()
    state = authors_state(a)
    head = ABDHead(
        backbone, 16, int(a["parts"]), attention_of(a), bool(a["use_head"]), dropout=0.0,
        channel_dropout=0.0,
    )  # fmt: skip
    model = ReIDModel(backbone, head)
    report = load_weights(model, use_our_names(state))
    assert (report.missing, report.unexpected) == ((), ())
    return model


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
    names = translate({name: torch.zeros(1)}, FORMATS_BY_NAME["abd-net"]).renamed
    return model.get_parameter(names[name])


def network_files(oracle_dir: Path) -> list[Path]:
    files = [
        path for path in sorted(oracle_dir.glob("abdnet_*.npz")) if "attention" not in path.stem
    ]
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
        shown = {
            position: POSITIONS[position] for position in POSITIONS if f"of_term.{position}" in a
        }
        features = FeatureOrthogonality(dict(shown.values()), float(a["of_beta"]))
        filters = WeightOrthogonality(beta=float(a["ow_beta"]))
        model.train()
        with recorded_outputs(model, features.network_outputs) as maps:
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
            scores = [
                layer(bank) for layer, bank in zip(classifiers, found.post.unbind(1), strict=True)
            ]
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


def test_the_gap_of_eigenvalues_by_its_definition() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 4, 6, dtype=torch.float64)
    start = torch.randn(2, 3, 4, dtype=torch.float64)

    def estimate(matrix: Tensor, x: Tensor) -> Tensor:
        u = matrix @ x
        return (u @ matrix @ u) / (u @ u)

    expected = []
    for image, one, other in zip(rows, *start, strict=True):
        matrix = image @ image.T
        largest = estimate(matrix, one)
        smallest = largest + estimate(matrix - largest * torch.eye(4, dtype=torch.float64), other)
        expected.append(largest - smallest)
    torch.testing.assert_close(eigenvalue_gap(rows, start), torch.stack(expected))
    orthogonal = torch.linalg.qr(rows[0, :, :4])[0][None]  # all eigenvalues are 1
    torch.testing.assert_close(eigenvalue_gap(orthogonal, start[:, :1]), torch.zeros(1).double())


def test_a_dead_map_counts_nothing() -> None:
    rows = torch.zeros(2, 4, 6)
    rows[1] = torch.arange(24).reshape(4, 6)
    rows.requires_grad_()
    torch.manual_seed(0)
    gap = eigenvalue_gap(rows, torch.randn(2, 2, 4))
    assert float(gap[0].detach()) == 0 < float(gap[1].detach())
    gap.sum().backward()
    assert rows.grad is not None
    assert not rows.grad[0].any()
    assert bool(rows.grad.isfinite().all())
    assert bool(rows.grad[1].any())


def test_energies_and_gaps_stay_in_single_precision_under_autocast() -> None:
    torch.manual_seed(0)
    feature = torch.randn(2, 8, 5, 3)
    module = ChannelAttention(8)
    nn.init.ones_(module.gamma)
    rows, start = feature.flatten(2), torch.randn(2, 2, 8)
    weight = torch.randn(6, 3, 7, 7)
    loss = WeightOrthogonality()
    plain = module(feature), eigenvalue_gap(rows, start), loss.penalty(weight, start[:, 0, :6])
    with torch.autocast("cpu", torch.bfloat16):
        found = module(feature), eigenvalue_gap(rows, start), loss.penalty(weight, start[:, 0, :6])
    for value, expected in zip(found, plain, strict=True):
        assert value.equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(feature.bfloat16()).dtype is torch.bfloat16


def make_model(parts: int = 2, **options: Any) -> ReIDModel:
    torch.manual_seed(0)
    backbone = small_backbone(4)
    return ReIDModel(backbone, ABDHead(backbone, 16, parts, **options))


def test_features_their_order_and_the_branches_own_last_stage() -> None:
    model = make_model().eval()
    image = torch.randn(3, 3, 64, 32)
    assert not hasattr(model.backbone.net.layer4, "0")
    first, second = model.head.last_stages
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is not other
        assert one.equal(other)  # copies
    with torch.no_grad():
        found = model(Batch.of(image))
        # another last stage of the attentive branch changes the parts alone
        nn.init.normal_(second[0].downsample[0].weight)
        changed = model(Batch.of(image))
    assert found.pre.shape == found.unit.shape == (3, 3, 16)
    assert found.test.shape == (3, 48)
    assert found.pre[:, 0].equal(changed.pre[:, 0])
    assert not torch.allclose(found.pre[:, 1:], changed.pre[:, 1:])
    torch.testing.assert_close(found.test, nn.functional.normalize(found.pre.flatten(1)))
    assert bool((found.pre[:, 0] >= 0).all())  # after the ReLU


def test_parts_must_divide_the_rows() -> None:
    model = make_model(parts=3)
    with pytest.raises(ConfigError, match=r"divisor of the 4 rows .*\(1, 2, 4\), got 3"):
        model(Batch.of(torch.randn(2, 3, 64, 32)))


def test_a_training_batch_of_one_image() -> None:
    model = make_model(dropout=0.0).train()
    assert bool(model(Batch.of(torch.randn(1, 3, 64, 32))).pre.isfinite().all())


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="expected a TimmBackbone, got ViT"):
        ABDHead(ViT((16, 16), embed_dim=24, depth=1, num_heads=3))
    with pytest.raises(ValueError, match="expected a ResNet of timm"):
        ABDHead(TimmBackbone("test_vit", (64, 64)))
    with pytest.raises(ValueError, match=r"num_parts of 1 or more .* got 16, 0, 0\.5, 0\.1"):
        make_model(parts=0)
    with pytest.raises(ValueError, match="attention: expected channels, positions or both, got"):
        make_model(attention=[])
    with pytest.raises(ValueError, match="8 channels or more, got 4"):
        ABDHead(small_backbone(4), 8, attention=["positions"])
    with pytest.raises(ValueError, match=r"outputs: expected modules, .* got \{\}"):
        FeatureOrthogonality({})
    with pytest.raises(ValueError, match=r"beta and start_epoch of 0 or more, got -1, 0"):
        FeatureOrthogonality({"x": 1.0}, beta=-1)
    with pytest.raises(ValueError, match="weights with one name or more"):
        WeightOrthogonality([])


def test_the_starting_weights() -> None:
    torch.manual_seed(0)
    head = ABDHead(small_backbone(8), 256)
    assert float(head.global_fc[0].weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert float(head.global_fc[1].weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert head.global_fc[1].bias.requires_grad
    assert (head.global_fc[3].p, head.merge[0].p, head.channels.expand[0].p) == (0.5, 0.1, 0.1)
    block = head.positions
    for layer, fan_out in ((block.reduce[0], 9 * 128), (block.attention.value, 128)):
        found = float(layer.weight.detach().std())
        assert found == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert not any(
        bool(gamma.any()) for gamma in (block.attention.gamma, head.channels.attention.gamma)
    )


def authors_names(model: ReIDModel, first: str) -> dict[str, Tensor]:
    """The network under the authors' names, with the global or the attentive branch first."""
    order = {"global": 0, "attentive": 1} if first == "global" else {"global": 1, "attentive": 0}
    whole, attentive = (f"branches.{order[name]}" for name in ("global", "attentive"))
    names = {
        "backbone.net.conv1.": "common_branch.backbone1.0.",
        "backbone.net.bn1.": "common_branch.backbone1.1.",
        "backbone.net.layer1.attention.": "common_branch.shallow_cam._cam_module.",
        "backbone.net.layer1.": "common_branch.backbone1.4.",
        "backbone.net.layer2.": "common_branch.backbone2.0.",
        "backbone.net.layer3.": "common_branch.backbone2.1.",
        "head.last_stages.0.": f"{whole}.0.backbone.",
        "head.last_stages.1.": f"{attentive}.0.backbone.",
        "head.global_fc.": f"{whole}.1.fc.",
        "head.reduction.": f"{attentive}.1.reduction.",
        "head.merge.": f"{attentive}.1.sum_conv.",
    }
    inside = {"reduce": "conv5c", "refine": "conv52", "expand": "conv7"}
    looks = {"identity": "before", "channels": "cam", "positions": "pam"}
    convolutions = {"query": "query_conv", "key": "key_conv", "value": "value_conv"}
    state = {f"{whole}.1.classifier.weight": torch.zeros(5, 16)}
    for name, value in model.state_dict().items():
        _, look, *rest = name.split(".")
        if look in looks:
            words = [inside.get(word, convolutions.get(word, word)) for word in rest]
            words = ["attention_module" if word == "attention" else word for word in words]
            theirs = ".".join([f"{attentive}.1.{looks[look]}_module", *words])
        else:
            start = next(start for start in names if name.startswith(start))
            theirs = names[start] + name.removeprefix(start)
        state[theirs] = value
    return state


@pytest.mark.parametrize("first", ["global", "attentive"])
def test_weights_of_the_authors_convert_in_either_order(tmp_path: Path, first: str) -> None:
    model = make_model().eval()
    source, output = tmp_path / "checkpoint_best.pth.tar", tmp_path / "ours.safetensors"
    state = {f"module.{name}": value for name, value in authors_names(model, first).items()}
    torch.save({"state_dict": state, "rank1": 0.9, "epoch": 3}, source)
    report = convert_weights(source, output)
    assert (report.unmapped, report.missing) == ((), ())
    assert len(report.left_out) == 1
    assert report.metadata["pixel_mean"] == "[0.485, 0.456, 0.406]"
    other = make_model()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_weights(other, read_checkpoint(output)[0])
    batch = Batch.of(torch.randn(2, 3, 64, 32))
    with torch.no_grad():
        assert other.eval()(batch).pre.equal(model(batch).pre)


@pytest.mark.parametrize(
    ("kind", "name", "pattern"),
    [
        ("resnet", "backbone.net.layer2", "*.layer1.*conv2.weight"),
        ("vit", "backbone.net.blocks.0", "*.qkv.weight"),
    ],
)
def test_other_networks_name_their_maps_and_weights(kind: str, name: str, pattern: str) -> None:
    torch.manual_seed(0)
    size = (32, 16)
    backbone: nn.Module = (
        TimmBackbone("test_resnet", size)
        if kind == "resnet"
        else ViT(size, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    )
    network = ReIDModel(backbone, BNNeckHead(backbone))
    features, filters = FeatureOrthogonality({name: 1.0}), WeightOrthogonality([pattern])
    batch = Batch.of(torch.randn(4, 3, *size))
    with recorded_outputs(network, features.network_outputs) as maps:
        found: Embeddings = network(batch)
    weights = find_weights(network, filters.network_weights)
    found = found._replace(aux={**maps, **weights})
    penalties = features(found, batch) | filters(found, batch)
    assert penalties.keys() == {"feature_orthogonality", "weight_orthogonality"}
    assert all(float(value.detach()) > 0 for value in penalties.values())
    torch.stack([*penalties.values()]).sum().backward()
    assert weights
    assert all(bool(parameter.grad.any()) for parameter in weights.values())


def test_a_parameter_without_rows_and_a_map_of_no_known_shape() -> None:
    bank = torch.ones(2, 1, 4)
    aux = {"x.bias": torch.ones(3), "y": torch.ones(2, 4)}
    embeddings = Embeddings(bank, bank, bank, bank[:, 0], aux)
    batch = Batch.of(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"two dimensions or more, but x\.bias has \(3,\)"):
        WeightOrthogonality(["x.*"]).check_aux(aux)
    with pytest.raises(ValueError, match=r"expected y to put out .* got \(2, 4\)"):
        FeatureOrthogonality({"y": 1.0}).check_aux(aux)
    later = FeatureOrthogonality({"y": 1.0}, start_epoch=3)
    assert (later(embeddings, batch), Criterion([later]).network_outputs) == ({}, ())
    later.epoch = 3
    assert Criterion([later]).network_outputs == ("y",)


def test_published_settings() -> None:
    for name in ("market", "duke", "msmt"):
        config = load_config(CONFIGS / f"{name}.yaml")
        assert config.model.head == {
            "name": "ABDHead", "dim": 1024, "num_parts": 2, "attention": ["channels", "positions"],
            "convolutions": True, "dropout": 0.5, "channel_dropout": 0.1,
        }  # fmt: skip
        assert config.model.backbone["attention"] == {"layer1": "channels"}
        assert (config.model.backbone["last_stride"], config.model.bn_samples_per_group) == (1, 32)
        assert config.input.size == (384, 128)
        assert (config.input.pixel_mean, config.input.pixel_std) == (
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
        )  # fmt: skip
        assert config.input.interpolation == config.input.test_interpolation == "bilinear"
        crop, flip, erasing = config.input.transforms
        assert crop == {"name": "RandomResizedCrop", "prob": 0.5, "aspect": [3.0, 3.0],
                        "area": pytest.approx([384 * 128 / (432 * 144)] * 2)}  # fmt: skip
        assert flip == {"name": "RandomFlip", "prob": 0.5}
        assert erasing == {"name": "RandomErasing", "prob": 0.5, "area": [0.02, 0.4],
                           "aspect": pytest.approx([0.3, 1 / 0.3]),
                           "fill": [0.4914, 0.4822, 0.4465]}  # fmt: skip
        assert config.dataloader.sampler == {
            "name": "RandomIdentitySampler", "batch_size": 64, "images_per_identity": 4,
            "epoch": "round",
        }  # fmt: skip
        first, second = config.of_stage(0), config.of_stage(1)
        assert [stage.epochs for stage in config.stage_settings] == [10, 80]
        assert [stage.losses for stage in config.stage_settings] == ["new", "carried"]
        for stage in (first, second):
            solver = stage.solver
            assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3e-4, 5e-4)
        rate = build_learning_rate(second.solver)
        expected = [3e-4] * 20 + [3e-5] * 20 + [3e-6] * 40
        assert [rate(epoch) for epoch in range(80)] == pytest.approx(expected)
        assert [build_learning_rate(first.solver)(epoch) for epoch in range(10)] == [3e-4] * 10
        entropy, triplet, features, filters = second.criterion
        assert first.criterion == [entropy, triplet]
        assert entropy == {"name": "CrossEntropy", "banks": "all", "smoothing": 0.1, "bias": True,
                           "init_std": 0.01}  # fmt: skip
        assert triplet == {"name": "Triplet", "banks": "all", "margin": 1.2, "weight": 0.1}
        assert filters["weights"] == ["backbone.net.conv1.weight"]
        assert [stage.solver.frozen_norms for stage in (first, second)] == ["eval", "train"]
        assert second.solver.frozen == {}
        assert (config.solver.amp, config.solver.warmup_epochs) == ("off", 0)
        assert config.datasets.train.get("with_val", True) is (name != "msmt")
        assert features["outputs"] == dict(POSITIONS.values())
        assert (features["beta"], features["start_epoch"], filters["beta"]) == (1e-6, 23, 1e-3)
        assert (config.test.flip, config.test.evaluator["normalize"]) == (True, False)


def test_layers_that_are_frozen_first() -> None:
    config = load_config(CONFIGS / "market.yaml").of_stage(0)
    model = make_model()
    losses = [CrossEntropy(16, 3, banks="all", num_parts=2)]
    optimization = build_optimization(config, model, Criterion(losses), torch.device("cpu"))
    optimization.set_modes(model, 0)
    frozen = {id(parameter) for parameter, _ in optimization._frozen}
    trained = {name for name, parameter in model.named_parameters() if id(parameter) not in frozen}
    start = ("head.global_fc", "head.reduction", "head.identity", "head.channels", "head.positions",
             "head.merge", "backbone.net.layer1.attention")  # fmt: skip
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(start)}
    norms = {
        name: module.training for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    }  # fmt: skip
    assert {name for name, training in norms.items() if training} == {
        name for name in norms if name.startswith(start)
    }


TINY: tuple[str, ...] = (
    "MODEL.BACKBONE.MODEL", "test_resnet", "MODEL.BACKBONE.OPTIONS", "null",
    "MODEL.HEAD.DIM", "16", "CLUSTERER", "null",
    "INPUT.SIZE", "[64, 32]", "STAGES.0.EPOCHS", "1", "STAGES.1.EPOCHS", "3",
    "SOLVER.MILESTONES", "[2]",
    "CRITERION.2.START_EPOCH", "1", "SOLVER.MAX_EPOCHS", "4", "CHECKPOINT_KEEP", "0",
    "LOG_PERIOD", "1", "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2",
    "CRITERION.3.WEIGHTS", "['backbone.net.conv1.0.weight']",
)  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    """The numbers of training in metrics.json, without times and memory."""
    left_out = ("kind", "data_time", "step_time", "memory_mb")
    read = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in left_out}
        for line in read
        if line["kind"] == "train"
    ]


def test_a_run_and_its_resumption_anywhere(tmp_path: Path, train_tiny: Callable[..., Path]) -> None:
    whole = train_tiny(CONFIGS / "synthetic.yaml", "whole", *TINY)
    seen = lines(whole)
    penalised = [("weight_orthogonality" in line, "feature_orthogonality" in line) for line in seen]
    assert penalised == [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)] * 4
    result = json.loads((whole / "results.json").read_text())["final"][0]
    assert "before normalisation" in result["ranked_by"]
    expected, _ = read_checkpoint(whole / "model_final.safetensors")
    for epoch in (1, 3):  # between the stages and within the second one
        part = tmp_path / f"from{epoch}"
        shutil.copytree(whole, part)
        for path in checkpoint_paths(part):
            if epoch_of(path) > epoch:
                path.unlink()
        (part / "model_final.safetensors").unlink()
        train_tiny(CONFIGS / "synthetic.yaml", part.name, *TINY, resume=True)
        found, _ = read_checkpoint(part / "model_final.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items()), epoch
        assert lines(part) == seen, epoch


def test_a_loss_that_would_begin_after_the_end_is_named(
    train_tiny: Callable[..., Path],
) -> None:
    folder = train_tiny(CONFIGS / "synthetic.yaml", "late", *TINY, "CRITERION.2.START_EPOCH", "3")
    warning = "FeatureOrthogonality takes no part in the training: it begins later than in epoch 2"
    assert (folder / "log.txt").read_text().count(warning) == 1
    assert not any("feature_orthogonality" in line for line in lines(folder))


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (("CRITERION.2.OUTPUTS", "{head.chanels: 1.0}"),
         r"stages\[1\]: criterion\[2\] .* no module 'head\.chanels' .*mean 'head\.channels'"),
        (("CRITERION.2.OUTPUTS", "{head: 1.0}"), r"output of head: expected a tensor, got Emb"),
        (("CRITERION.2.OUTPUTS", "{head.global_fc: 1.0}"),
         r"criterion\[2\] .*: outputs: expected head\.global_fc to put out .* got \(1, 16\)"),
        (("CRITERION.2.OUTPUTS", "{backbone.net.layer4: 1.0}"),
         r"output of backbone\.net\.layer4: .* no layers, since the head took them"),
        (("CRITERION.3.WEIGHTS", "[head.x]"), r"no parameter 'head\.x'"),
        (("CRITERION.3.WEIGHTS", "['*.weight']"), r"two dimensions or more, but .* has \(16,\)"),
        (("MODEL.HEAD.NUM_PARTS", "3"),
         r"stages\[1\]: model\.head\.num_parts: expected a divisor of the 4 rows"),
        (("MODEL.COMPILE", "default"), r"model\.compile: expected off with FeatureOrthogonality"),
        (("STAGES.0.LOSSES", "carried"), r"stages\[0\]\.losses: expected new"),
        (("STAGES.1.CRITERION", "[{NAME: CrossEntropy, BANKS: global}, Triplet]"),
         r"stages\[1\]\.losses: CrossEntropy cannot go on .* same options in both stages"),
        (("CRITERION", "[Triplet]"), r"carried needs the losses of the stage before \(C"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_training(
    train_tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    pairs: tuple[str, ...],
    problem: str,
) -> None:
    monkeypatch.setattr("reid.assembly.network.compile_network", lambda network, mode: None)
    with pytest.raises(ConfigError, match=problem):
        train_tiny(CONFIGS / "synthetic.yaml", "run", *TINY, *pairs)


def test_the_penalties_with_another_methods_network(train_tiny: Callable[..., Path]) -> None:
    criterion = (
        "[{NAME: O2CAPLoss}, {NAME: FeatureOrthogonality, OUTPUTS: {backbone.net.blocks.1: 1.0}}, "
        "{NAME: WeightOrthogonality, WEIGHTS: ['backbone.net.blocks.*.attn.qkv.weight']}]"
    )
    folder = train_tiny(
        CONFIGS.parents[1] / "TMGF" / "configs" / "synthetic.yaml", "tmgf",
        "PLUGINS", "[tmgf, abdnet]", "CRITERION", criterion, "SOLVER.MILESTONES", "[1]",
        "MODEL.BACKBONE.EMBED_DIM", "24", "MODEL.BACKBONE.DEPTH", "3", "LOG_PERIOD", "1",
        "MODEL.BACKBONE.STEM_CHANNELS", "8", "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2",
    )  # fmt: skip
    assert all(
        line["feature_orthogonality"] > 0 < line["weight_orthogonality"] for line in lines(folder)
    )
