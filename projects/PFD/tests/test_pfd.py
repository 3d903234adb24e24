"""PFD's head and loss on data on which the published code fails, and their options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reid.modeling.losses import Triplet
from reid.modeling.model import ReIDModel
from reid.modeling.vit import ViT
from reid.projects.pfd import HEATMAP, JOINTS, POSE, PFDHead, PFDLoss, PoseEstimator
from reid.projects.pfd.decoder import DecoderLayer
from reid.projects.pfd.matching import fill_slots, split_slots
from reid.projects.pfd.pose import MIRRORED_JOINTS
from reid.registry import HEAD, ConfigError, build
from reid.structures import Batch, Embeddings

SIZE = (48, 32)
SMALL: dict[str, Any] = {"decoder_layers": 1, "decoder_heads": 4, "decoder_width": 24,
                         "dropout": 0.0}  # fmt: skip


def vit(**options: Any) -> ViT:
    given = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "drop_path": 0.0}
    return ViT(SIZE, **given | options)


def model_of(**options: Any) -> ReIDModel:
    torch.manual_seed(0)
    backbone = vit()
    return ReIDModel(backbone, PFDHead(backbone, **SMALL | options))


def batch_of(peak: float | Tensor = 1.0, count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    heatmap = torch.rand(count, 17, 12, 8, generator=generator)
    heatmap = heatmap / heatmap.amax((2, 3), keepdim=True) * peak
    batch = Batch.of(torch.randn(count, 3, *SIZE, generator=generator))
    return batch._replace(side={HEATMAP: heatmap})


def loss_of(model: ReIDModel, **options: Any) -> PFDLoss:
    torch.manual_seed(0)
    loss = PFDLoss(model.embed_dim, model.num_parts, 3, **options)
    for part in (loss, *loss.parts, *loss.slots):
        part.cluster = torch.arange(6) // 2
    return loss


def test_a_batch_that_shows_every_joint_has_no_push() -> None:
    model, batch = model_of().train(), batch_of(1.0)
    loss = loss_of(model)
    found = model(batch)
    assert not found.aux["hidden"].any()
    values = loss(found, batch)
    assert float(values["pfd_hidden"].detach()) == 0
    torch.stack([*values.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("count", [6, 1])
def test_a_batch_that_shows_no_joint(count: int) -> None:
    model, batch = model_of().train(), batch_of(0.1, count)
    found = model(batch)
    listed = found.aux["slots_pre"][:, 1:]
    assert listed[:, 0].any(1).all(), "the mean of all is the list"
    assert not listed[:, 1:].any()
    assert torch.isfinite(found.test).all()
    if count > 1:
        values = loss_of(model)(found, batch)
        torch.stack([*values.values()]).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_ties_among_slots_of_zeros_pass_no_gradient() -> None:
    """All distances of the slots that no image shows are 0."""
    model, batch = model_of().train(), batch_of(0.1)
    slots = model(batch).aux["slots_pre"].detach()[:, 2:].requires_grad_()
    assert not slots.any()
    triplet = Triplet(None, banks="all", num_parts=slots.shape[1] - 1)
    triplet.cluster = torch.arange(6) // 2
    value = triplet(Embeddings(slots, slots, slots, slots[:, 0]), batch)["triplet"]
    assert float(value.detach()) == pytest.approx(math.log(2), abs=1e-5)  # soft margin of 0
    value.backward()
    assert slots.grad is not None
    assert not slots.grad.any()


def test_slots_one_by_one() -> None:
    """The published loops over images and slots."""
    generator = torch.Generator().manual_seed(0)
    parts, pose, views = (torch.randn(5, 4, 6, generator=generator) for _ in range(3))
    hidden = (
        torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]) > 0
    )
    cosine = torch.nn.functional.cosine_similarity
    for own_part in (False, True):
        slots = fill_slots(parts, pose, views, hidden, own_part=own_part)
        visible, covered, listed = split_slots(slots)
        for b in range(5):
            posed = [parts[b, j] * pose[b, j] for j in range(4)]
            seen, unseen = [], []
            fused = []
            for i in range(4):
                near = max(range(4), key=lambda j: float(cosine(parts[b, i], posed[j], 0)))
                fused.append(parts[b, i] + posed[near])
            for i in range(4):
                k = max(range(4), key=lambda k: float(cosine(fused[i], views[b, k], 0)))
                assert int(slots.view[b, i]) == k
                slot = fused[i] + views[b, k] if own_part else fused[k] + views[b, i]
                (unseen if hidden[b, k] else seen).append(slot)
            whole = torch.stack(seen + unseen).mean(0)
            torch.testing.assert_close(visible[b], torch.stack(seen).mean(0) if seen else whole)
            zeros = torch.zeros(6)
            torch.testing.assert_close(covered[b], torch.stack(unseen).mean(0) if unseen else zeros)
            expected = torch.stack([*(seen or [whole]), *[zeros] * 4])[:4]
            torch.testing.assert_close(listed[b], expected)


def test_hidden_joints_are_those_with_a_low_peak() -> None:
    model = model_of(hidden_below=0.5).eval()
    head = model.head
    assert isinstance(head, PFDHead)
    peak = torch.ones(6, 17)
    peak[2, :9] = 0.4
    batch = batch_of(peak[:, :, None, None])
    with torch.no_grad():
        tokens = model.backbone(batch).tokens
        heatmap = head._heatmaps(batch)
        slots = head.slots(head._parts(tokens), tokens, heatmap)
    assert torch.equal(slots.hidden, (peak < 0.5).gather(1, slots.view))


def test_groups_of_patches() -> None:
    """Patches in their order; the last part takes the rest."""
    backbone = vit(patch_stride=6)  # 7 x 5 patches
    head = PFDHead(backbone, **SMALL)
    seen: list[Tensor] = []

    class Record(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            seen.append(tokens)
            return tokens

    head.local = nn.Sequential(Record(), nn.Identity())
    tokens = torch.arange(36.0)[None, :, None].expand(2, -1, 24)
    head._parts(tokens)
    even, rest = (group[..., 0] for group in seen)
    assert even.reshape(2, 16, 3)[1].tolist() == [[0, 1 + 2 * i, 2 + 2 * i] for i in range(16)]
    assert rest[0].tolist() == [0, 33, 34, 35]


def test_the_last_layer_moves_to_the_head() -> None:
    backbone = vit()
    last = backbone.net.blocks[-1]
    head = PFDHead(backbone, **SMALL)
    assert head.local[0] is last
    assert len(backbone.net.blocks) == 1


def test_test_features_have_36_parts() -> None:
    model = model_of().eval()
    with torch.no_grad():
        found = model(batch_of())
        alone = model(batch_of()._replace(**{
            name: getattr(batch_of(), name)[2:3] for name in ("image", "camid", "domain", "index")
        }, side={HEATMAP: batch_of().side[HEATMAP][2:3]}))  # fmt: skip
    assert found.test.shape == (6, 36 * 24)
    torch.testing.assert_close(found.test.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(found.test[2:3], alone.test, atol=1e-5, rtol=1e-5)
    parts = found.test.reshape(6, 36, 24)
    torch.testing.assert_close(
        parts[:, 1] / parts[:, 0].norm(dim=1, keepdim=True),
        found.post[:, 1] / 17 / found.post[:, 0].norm(dim=1, keepdim=True),
    )


def test_without_cameras_and_in_half_precision() -> None:
    """The published code cannot switch the vectors of cameras off."""
    model, batch = model_of(), batch_of()
    assert model.num_cameras == 0
    with torch.autocast("cpu", torch.bfloat16):
        found = model.train()(batch)
        values = loss_of(model)(found, batch)
    assert all(value.dtype == torch.float32 for value in values.values())
    assert torch.isfinite(torch.stack([*values.values()])).all()


def test_the_residual_of_the_decoder() -> None:
    torch.manual_seed(0)
    as_published = DecoderLayer(24, 4, 24, 0.0, False)
    corrected = DecoderLayer(24, 4, 24, 0.0, True)
    corrected.load_state_dict(as_published.state_dict())
    view, query, memory = torch.randn(2, 17, 24), torch.randn(1, 17, 24), torch.randn(2, 9, 24)
    inner: list[Tensor] = []
    as_published.norm2.register_forward_hook(lambda _, __, out: inner.append(out))
    found, other = (layer(view, query, memory) for layer in (as_published, corrected))
    (middle,) = inner
    small = as_published.linear2(as_published.linear1(middle).relu())
    torch.testing.assert_close(found, as_published.norm3(2 * small))
    torch.testing.assert_close(other, as_published.norm3(middle + small))


def test_hidden_features_together_and_apart() -> None:
    model, batch = model_of().train(), batch_of(torch.rand(6, 17, 1, 1))
    found = model(batch)
    together, apart = (float(loss_of(model, hidden=way)(found, batch)["pfd_hidden"].detach())
                       for way in ("together", "apart"))  # fmt: skip
    assert together + apart == pytest.approx(1, abs=1e-5)
    assert together != pytest.approx(apart)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expected a ViT, got Linear"):
        PFDHead(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected 17 patches or more, .* got 8"):
        PFDHead(vit(patch_size=16, patch_stride=10), **SMALL)
    with pytest.raises(ValueError, match="decoder_heads: expected a divisor of 24, got 5"):
        PFDHead(vit(), **SMALL | {"decoder_heads": 5})
    model = model_of()
    with pytest.raises(ConfigError, match=r"no heatmaps.*INPUT\.MAPS.*MODEL\.HEAD\.POSE"):
        model(Batch.of(torch.zeros(2, 3, *SIZE)))
    small = batch_of()._replace(side={HEATMAP: torch.zeros(6, 17, 5, 5)})
    with pytest.raises(ConfigError, match=r"\(6, 17, 12, 8\), got \(6, 17, 5, 5\)"):
        model(small)
    found = model(batch_of())._replace(aux={})
    with pytest.raises(ConfigError, match=r"needs MODEL\.HEAD"):
        loss_of(model)(found, batch_of())


def test_an_estimator_by_name() -> None:
    @POSE.register()
    class OfTheRedChannel(PoseEstimator):
        def __init__(self, gain: float = 1.0) -> None:
            self._gain = gain

        def __call__(self, image: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            small = nn.functional.adaptive_avg_pool2d(image[:, :1], (12, 8))
            return self._gain * small.expand(-1, 17, -1, -1)

    try:
        spec = {"name": "PFDHead", "pose": {"name": "OfTheRedChannel", "gain": 2.0}, **SMALL}
        backbone = vit()
        torch.manual_seed(0)
        model = ReIDModel(backbone, build(HEAD, spec, "model.head", backbone=backbone)).eval()
        with torch.no_grad():
            image = torch.randn(3, 3, *SIZE)
            found = model(Batch.of(image))
            other = model(Batch.of(image.flip(3)))
        assert found.test.shape == (3, 36 * 24)
        assert not torch.allclose(found.test, other.test)
        assert isinstance(model.head, PFDHead)
        model.head._pose = (lambda image: [image],)
        with pytest.raises(ConfigError, match=r"expected heatmaps \(3, 17, 12, 8\), got list"):
            model(Batch.of(image))
        wrong = {**spec, "pose": {"name": "OfTheRedChannel", "gian": 2.0}}
        with pytest.raises(ConfigError, match=r"model\.head\.pose\.gian"):
            build(HEAD, wrong, "model.head", backbone=vit())
    finally:
        POSE._obj_map.pop("OfTheRedChannel")


def test_left_and_right() -> None:
    for place, name in enumerate(JOINTS):
        other = name.replace("left", "RIGHT").replace("right", "left").replace("RIGHT", "right")
        assert JOINTS[MIRRORED_JOINTS[place]] == other
