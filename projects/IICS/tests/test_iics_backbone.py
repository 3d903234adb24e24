"""IICS's backbone: AIBN against the authors' numbers, groups, mirror images, weights."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.formats import find_format, translate
from reid.modeling.weights import load_backbone_weights
from reid.projects.iics.backbone import AIBN, AIBNResNet, put_aibn_in_block
from reid.structures import Batch


def blocks_of(a: dict[str, Tensor]) -> nn.Sequential:
    """Two blocks with the shapes and the stride of the file's."""
    _, inputs, *_ = a["state.0.conv1.weight"].shape
    outputs = len(a["state.0.conv3.weight"])
    stride = int(a["stride"])
    shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
    )
    blocks = nn.Sequential(
        Bottleneck(inputs, outputs // 4, stride, shortcut), Bottleneck(outputs, outputs // 4)
    )
    for block in blocks:
        put_aibn_in_block(block, 0.1)
    return blocks


def agree(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= tolerance, f"{what}: {float(error)}"


@pytest.mark.oracle
def test_aibn_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("iics_aibn_*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
        blocks = blocks_of(a)
        theirs = {k.removeprefix("state."): v for k, v in a.items() if k.startswith("state.")}
        ours = {name: theirs.pop(name) for name in blocks.state_dict() if name in theirs}
        report = blocks.load_state_dict(ours, strict=False)
        assert all(name.endswith("num_batches_tracked") for name in report.missing_keys)
        # each layer of a block has the block's number again
        assert all(name.endswith(".adaptive_weight") for name in theirs)
        assert float(ours["1.adaptive_weight"]) > 1  # outside 0 to 1: the clamp counts
        blocks.eval()
        agree(blocks(a["input"]), a["eval_output"], 1e-5, f"{path} evaluation")
        blocks.train()
        image = a["input"].requires_grad_()
        output = blocks(image)
        agree(output, a["train_output"], 1e-5, f"{path} training")
        (output * a["grad_output"]).sum().backward()
        gradients = {name: value.grad for name, value in blocks.named_parameters()}
        for name, gradient in (*gradients.items(), ("", image.grad)):
            expected = a[f"grad.{name}" if name else "input_grad"]
            error = (gradient - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            assert error <= 1e-4, f"{path} gradient {name}: {float(error)}"
        for name, value in blocks.state_dict().items():
            if "running" in name:
                agree(value, a[f"after.{name}"], 1e-5, f"{path} {name}")


def layer() -> AIBN:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    plain.running_mean = torch.randn(5)
    plain.running_var = torch.rand(5) + 0.5
    return AIBN(plain, nn.Parameter(torch.tensor([0.3])))


@pytest.mark.parametrize("running", ["first", "all"])
def test_groups_are_as_if_they_came_one_after_the_other(running: str) -> None:
    grouped, alone = layer(), layer()
    image = torch.randn(12, 5, 4, 3) * torch.arange(1, 13)[:, None, None, None]
    group_batch_norms(nn.Sequential(grouped), 4, running)  # type: ignore[arg-type]
    found = grouped(image)
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        torch.testing.assert_close(found[part], alone(image[part]), atol=1e-5, rtol=1e-5)
        if running == "first" and not start:
            torch.testing.assert_close(grouped.running_var, alone.running_var)
    if running == "all":
        torch.testing.assert_close(grouped.running_mean, alone.running_mean)
        torch.testing.assert_close(grouped.running_var, alone.running_var)


def test_one_image_and_one_pixel_are_finite() -> None:
    for shape in ((1, 5, 4, 3), (3, 5, 1, 1), (1, 5, 1, 1)):
        norm, image = layer(), torch.randn(shape, requires_grad=True)
        norm(image).square().sum().backward()
        assert image.grad is not None
        assert bool(torch.isfinite(image.grad).all())
        assert bool((norm.running_var > 0).all())


def test_a_copied_block_shares_its_own_number() -> None:
    block = Bottleneck(16, 4)
    put_aibn_in_block(block, 0.1)
    twin = copy.deepcopy(block)
    assert [name for name in twin.state_dict() if "adaptive" in name] == ["adaptive_weight"]
    assert all(getattr(twin, name)._share[0] is twin.adaptive_weight for name in ("bn1", "bn3"))


def test_features_in_evaluation_are_means_with_the_mirror_image() -> None:
    torch.manual_seed(0)
    net = AIBNResNet("test_resnet", (32, 24), last_stride=1)
    plain = AIBNResNet("test_resnet", (32, 24), mirror=False, last_stride=1)
    plain.load_state_dict(net.state_dict())
    image = torch.randn(3, 3, 32, 24)
    batch, mirrored = Batch.of(image), Batch.of(image.flip(3))
    net.eval()
    plain.eval()
    expected = (plain(batch).tokens[:, 0] + plain(mirrored).tokens[:, 0]) / 2
    found = net(batch)
    torch.testing.assert_close(found.tokens[:, 0], expected)
    torch.testing.assert_close(found.tokens[:, 0], net(mirrored).tokens[:, 0])
    height, width = found.grid
    grid = found.tokens[:, 1:].unflatten(1, (height, width))
    torch.testing.assert_close(net(mirrored).tokens[:, 1:].unflatten(1, found.grid).flip(2), grid)
    net.train()
    plain.train()
    torch.testing.assert_close(net(batch).tokens, plain(batch).tokens)


def test_imagenet_weights_with_running_counts_load(tmp_path: Path) -> None:
    """The published code stops at today's torchvision weights, which have running counts."""
    net = AIBNResNet("test_resnet", (32, 24))
    inner = {name.removeprefix("net."): value for name, value in net.state_dict().items()}
    state = {k: v for k, v in inner.items() if not k.endswith("adaptive_weight")}
    state |= {f"layer4.0.bn{i}.num_batches_tracked": torch.tensor(7) for i in (1, 2, 3)}
    torch.save(state, tmp_path / "imagenet.pth")
    other = AIBNResNet("test_resnet", (32, 24))
    report = load_backbone_weights(other, tmp_path / "imagenet.pth")
    assert {name.rpartition(".")[2] for name in report.missing} == {"adaptive_weight"}
    assert torch.equal(other.net.layer4[0].bn1.weight, net.net.layer4[0].bn1.weight)


def test_the_authors_names_become_ours() -> None:
    net = AIBNResNet("resnet50", (32, 16), last_stride=1)
    theirs = {}
    for name, value in net.state_dict().items():
        inner = "model." + name.removeprefix("net.")
        theirs[inner] = value
        if inner.endswith("running_var") and ("layer3" in inner or "layer4" in inner):
            theirs[inner.replace("running_var", "adaptive_weight")] = torch.tensor([0.2])
    theirs |= {"classifier.0.weight": torch.ones(2048), "classifier.1.weight": torch.ones(9, 2048)}
    written = find_format(theirs)
    assert written is not None
    assert written.name == "iics"
    found = translate(theirs, written)
    assert not found.unmapped
    assert found.state.keys() == {f"backbone.{name}" for name in net.state_dict()}


def test_only_plain_resnets() -> None:
    with pytest.raises(ValueError, match="AIBN needs a plain ResNet of timm, not a"):
        AIBNResNet("vit_tiny_patch16_224", (32, 16))
