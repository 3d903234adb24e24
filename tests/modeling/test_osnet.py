"""OSNet, compared with a functional version that reads torchreid's names."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.convert import convert_weights
from reid.modeling.formats import find_format
from reid.modeling.heads import BNNeckHead
from reid.modeling.model import ReIDModel
from reid.modeling.osnet import Norm, OSNet
from reid.modeling.weights import WeightsError, load_backbone_weights
from reid.registry import BACKBONE, ConfigError, build
from reid.structures import Batch

CHANNELS = {0.25: (16, 64, 96, 128), 0.5: (32, 128, 192, 256), 1.0: (64, 256, 384, 512)}
INSTANCE_NORMS: dict[Norm, set[str]] = {
    "batch": set(),
    "ibn": {"conv2.0", "conv2.1"},
    "ain": {"conv2.0", "conv2.1", "conv3.1", "conv4.0"},
}
NORMS: tuple[Norm, ...] = ("batch", "ibn", "ain")
State = dict[str, Tensor]


def torchreid_state(norm: Norm = "batch", width: float = 0.25) -> State:
    """Random tensors under the names of a checkpoint of torchreid."""
    state: State = {}

    def weights(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape) * (2 / max(shape[1:])) ** 0.5

    def norms(name: str, count: int, instance: bool = False) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(2, count) + 0.5
        if not instance:
            state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.rand(2, count) + 0.5
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    channels = CHANNELS[width]
    weights("conv1.conv", channels[0], 3, 7, 7)
    norms("conv1.bn", channels[0], instance=norm != "batch")
    for stage, (old, new) in enumerate(itertools.pairwise(channels), 2):
        for number in (0, 1):
            block, given, inner = f"conv{stage}.{number}", old if number == 0 else new, new // 4
            inside = norm == "ain" and block in INSTANCE_NORMS[norm]
            weights(f"{block}.conv1.conv", inner, given, 1, 1)
            norms(f"{block}.conv1.bn", inner)
            for light in light_convs(block, norm):
                weights(f"{light}.conv1", inner, inner, 1, 1)
                weights(f"{light}.conv2", inner, 1, 3, 3)
                norms(f"{light}.bn", inner)
            for name, shape in (("fc1", (inner // 16, inner)), ("fc2", (inner, inner // 16))):
                weights(f"{block}.gate.{name}", *shape, 1, 1)
                state[f"{block}.gate.{name}.bias"] = torch.randn(shape[0])
            weights(f"{block}.conv3.conv", new, inner, 1, 1)
            if not inside:
                norms(f"{block}.conv3.bn", new)
            if block in INSTANCE_NORMS[norm]:
                norms(f"{block}.IN", new, instance=True)
            if given != new:
                weights(f"{block}.downsample.conv", new, given, 1, 1)
                norms(f"{block}.downsample.bn", new)
        if stage < 4:
            behind = f"pool{stage}.0" if norm == "ain" else f"conv{stage}.2.0"
            weights(f"{behind}.conv", new, new, 1, 1)
            norms(f"{behind}.bn", new)
    weights("conv5.conv", channels[-1], channels[-1], 1, 1)
    norms("conv5.bn", channels[-1])
    weights("fc.0", 512, channels[-1])
    state["fc.0.bias"] = torch.randn(512)
    norms("fc.1", 512)
    return state


def light_convs(block: str, norm: Norm, scale: int | None = None) -> list[str]:
    """The names of the light convolutions of a block, or of one scale (from 0)."""
    names = []
    for s in range(4) if scale is None else (scale,):
        for i in range(s + 1):
            plain = f"conv2{'abcd'[s]}" + (f".{i}" if s else "")
            names.append(f"{block}.{f'conv2.{s}.layers.{i}' if norm == 'ain' else plain}")
    return names


def torchreid_feature(state: State, norm: Norm, image: Tensor) -> Tensor:
    """The feature (B, 512) that the paper's equations give with these tensors."""

    def normalised(x: Tensor, name: str) -> Tensor:
        scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
        if f"{name}.running_mean" not in state:
            return F.instance_norm(x, weight=scale, bias=shift)
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, scale, shift)

    def layer(x: Tensor, name: str) -> Tensor:
        return F.relu(normalised(F.conv2d(x, state[f"{name}.conv.weight"]), f"{name}.bn"))

    def gated(x: Tensor, name: str) -> Tensor:
        means = x.mean((2, 3))
        for number, act in ((1, torch.relu), (2, torch.sigmoid)):
            weight = state[f"{name}.fc{number}.weight"][:, :, 0, 0]
            means = act(means @ weight.T + state[f"{name}.fc{number}.bias"])
        return x * means[:, :, None, None]

    def block(x: Tensor, name: str) -> Tensor:
        reduced = layer(x, f"{name}.conv1")
        total = torch.zeros_like(reduced)
        for scale in range(4):
            stream = reduced
            for light in light_convs(name, norm, scale):
                stream = F.conv2d(stream, state[f"{light}.conv1.weight"])
                kernel = state[f"{light}.conv2.weight"]
                stream = F.conv2d(stream, kernel, padding=1, groups=len(kernel))
                stream = F.relu(normalised(stream, f"{light}.bn"))
            total = total + gated(stream, f"{name}.gate")
        residual = F.conv2d(total, state[f"{name}.conv3.conv.weight"])
        has_norm = name in INSTANCE_NORMS[norm]
        inside = norm == "ain" and has_norm
        residual = normalised(residual, f"{name}.IN" if inside else f"{name}.conv3.bn")
        if f"{name}.downsample.conv.weight" in state:
            x = F.conv2d(x, state[f"{name}.downsample.conv.weight"])
            x = normalised(x, f"{name}.downsample.bn")
        total = x + residual
        return F.relu(normalised(total, f"{name}.IN") if has_norm and not inside else total)

    x = F.conv2d(image, state["conv1.conv.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(normalised(x, "conv1.bn")), 3, 2, 1)
    for stage in (2, 3, 4):
        x = block(block(x, f"conv{stage}.0"), f"conv{stage}.1")
        if stage < 4:
            behind = f"pool{stage}.0" if norm == "ain" else f"conv{stage}.2.0"
            x = F.avg_pool2d(layer(x, behind), 2)
    pooled = layer(x, "conv5").mean((2, 3))
    return F.relu(normalised(F.linear(pooled, state["fc.0.weight"], state["fc.0.bias"]), "fc.1"))


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> Norm:
    torch.manual_seed(0)
    chosen: Norm = request.param
    return chosen


@pytest.mark.parametrize("ending", ["osnet.pth", "model.pth.tar-60"])
def test_a_checkpoint_of_torchreid_gives_its_features(
    norm: Norm, ending: str, tmp_path: Path
) -> None:
    state = torchreid_state(norm)
    content: dict[str, object] = dict(state)
    if ending != "osnet.pth":
        classifier = {"classifier.weight": torch.ones(9, 512), "classifier.bias": torch.ones(9)}
        content = {"epoch": 60, "rank1": 0.9, "state_dict": {
            f"module.{name}": value for name, value in (state | classifier).items()}}  # fmt: skip
    torch.save(content, tmp_path / ending)
    report = convert_weights(tmp_path / ending, tmp_path / "ours.safetensors")
    assert report.written.name == ("osnet-ain" if norm == "ain" else "osnet")
    assert len(report.renamed) == len(state)
    assert len(report.left_out) == (0 if ending == "osnet.pth" else 2)
    assert report.metadata["pixel_mean"] == "[0.485, 0.456, 0.406]"

    backbone = OSNet(0.25, norm)
    loaded = load_backbone_weights(backbone, tmp_path / "ours.safetensors")
    assert not loaded.missing + loaded.unexpected + loaded.resized
    model = ReIDModel(backbone, BNNeckHead(backbone, "before")).eval()
    image = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        expected = torchreid_feature(state, norm, image)
        found = model(Batch.of(image))
    assert expected.std() > 0.1
    assert (found.pre[:, 0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found.test - F.normalize(expected)).abs().max() < 1e-6


@pytest.mark.parametrize("gone", ["conv4.1.conv3.conv.weight", "fc.1.running_var", "conv1.bn.bias",
                                  "conv2.0.gate.fc1.bias"])  # fmt: skip
def test_a_missing_tensor_is_reported(gone: str, norm: Norm, tmp_path: Path) -> None:
    state = torchreid_state(norm)
    del state[gone]
    torch.save(state, tmp_path / "osnet.pth")
    with pytest.raises(WeightsError, match=r"0 unmapped \(none\), 1 missing \(backbone\.net\."):
        convert_weights(tmp_path / "osnet.pth", tmp_path / "ours.safetensors")


def test_weights_of_another_width_do_not_fit(tmp_path: Path) -> None:
    torch.save(torchreid_state(width=0.5), tmp_path / "osnet.pth")
    with pytest.raises(WeightsError, match=r"net\.stem\.conv\.weight: file \(32, 3, 7, 7\), model"):
        load_backbone_weights(OSNet(0.25), tmp_path / "osnet.pth")


def test_our_files_are_not_mistaken_for_torchreids() -> None:
    found = find_format(f"backbone.{name}" for name in OSNet(0.25).state_dict())
    assert found is not None
    assert found.name == "reid"


def test_parameters_are_as_many_as_published() -> None:
    found = {
        width: round(sum(p.numel() for p in OSNet(width).parameters()) / 1e6, 1)
        for width in (1.0, 0.75, 0.5, 0.25)
    }
    assert found == {1.0: 2.2, 0.75: 1.3, 0.5: 0.6, 0.25: 0.2}


def test_whole_image_and_map_lie_in_one_space(norm: Norm) -> None:
    backbone = OSNet(0.25, norm)
    torch.nn.init.normal_(backbone.net.fc.weight)
    tokens, grid, _ = backbone.eval()(Batch.of(torch.randn(2, 3, 96, 32)))
    assert grid == (6, 2)
    assert tokens.shape == (2, 13, backbone.embed_dim) == (2, 13, 512)
    same = torch.ones(1, 1, backbone.net.fc.in_features)
    assert torch.equal(backbone.net.embed_places(same)[:, 0], backbone.net.embed(same[:, 0]))


def test_statistics_of_the_embedding_come_from_whole_images() -> None:
    backbone = OSNet(0.25).double().train()
    torch.nn.init.normal_(backbone.net.fc.weight)
    image = torch.randn(4, 3, 64, 32, dtype=torch.double)
    pooled = backbone.net.fc(backbone.net.map(image).mean((2, 3)))
    whole = backbone(Batch.of(image)).tokens[:, 0]
    assert torch.allclose(whole, F.relu(F.batch_norm(pooled, None, None, training=True)))
    before = backbone.state_dict()["net.fc_norm.running_mean"].clone()
    assert torch.allclose(before, 0.1 * pooled.mean(0))
    backbone(Batch.of(image[:1]))  # one image has no variance
    assert torch.equal(backbone.state_dict()["net.fc_norm.running_mean"], before)
    group_batch_norms(backbone, 0)
    assert backbone(Batch.of(image[:1])).tokens.isfinite().all()
    assert not torch.equal(backbone(Batch.of(image)).tokens, whole)


def test_options_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"width: expected 0\.25, 0\.5, 0\.75, 1\.0, got 2\.0"):
        build(BACKBONE, {"name": "OSNet", "width": 2}, "model.backbone")
    with pytest.raises(ValueError, match="norm: expected batch, ibn, ain, got 'bn'"):
        OSNet(norm="bn")  # type: ignore[arg-type]
