from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.formats import use_our_names
from reid.modeling.heads import BNNeckHead
from reid.modeling.model import ReIDModel
from reid.modeling.weights import (
    WeightsError,
    load_backbone_weights,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from reid.projects.tmgf import IBNViT, TMGFHead
from reid.structures import Batch

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3, "stem_channels": 16,
                         "drop_path": 0.0}  # fmt: skip


def variant_of(name: str) -> dict[str, Any]:
    """Options of the head in a file's name: full_K1_K2, single_K, no_dup, global_b1, global_b2."""
    if found := re.search(r"full_(\d+)_(\d+)", name):
        return {"granularities": (int(found[1]), int(found[2]))}
    if found := re.search(r"single_(\d+)", name):
        return {"granularities": (int(found[1]),)}
    if found := re.search(r"global_b([12])", name):
        return {"global_fusion": ("first", "second")[int(found[1]) - 1]}
    assert "no_dup" in name, name
    return {"duplicate_layer": False}


def model(
    size: tuple[int, int] = (96, 48), num_cameras: int = 4, head: Any = None, **options: Any
) -> ReIDModel:
    torch.manual_seed(0)
    backbone = IBNViT(size, num_cameras=num_cameras, **(SMALL | options))
    return ReIDModel(backbone, TMGFHead(backbone, **(head or {})))


def images(count: int, size: tuple[int, int] = (96, 48)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.oracle
def test_outputs_and_gradients_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("model_*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(v)) for name, v in np.load(path).items()}
        state = {n.removeprefix("state."): v for n, v in a.items() if n.startswith("state.")}
        dim = state["base.cls_token"].shape[2]
        depth = len({n.split(".")[2] for n in state if n.startswith("base.blocks.")})
        image = a["image"].float()
        variant = variant_of(path.stem)
        backbone = IBNViT(
            (image.shape[2], image.shape[3]), num_cameras=len(state["base.sie_embed"]),
            embed_dim=dim, depth=depth, num_heads=3, drop_path=0.0,
            stem_channels=len(state["base.patch_embed.conv.0.weight"]),
        )  # fmt: skip
        net = ReIDModel(backbone, TMGFHead(backbone, **variant))
        report = load_weights(net, use_our_names(state))
        unused = {"base.norm", f"base.blocks.{depth - 1}"} if len(net.head.branches) > 1 else set()
        assert all(name.startswith(tuple(unused)) for name in report.unexpected), path
        camid = a["camid"].long()
        with torch.no_grad():
            found = net.eval()(Batch.of(image, camid))
        close = {"atol": 1e-5, "rtol": 0}
        torch.testing.assert_close(found.test, a["eval_global"], **close, msg=str(path))
        torch.testing.assert_close(found.unit[:, 1:].transpose(0, 1), a["eval_part"], **close)
        found = net.train()(Batch.of(image, camid))
        torch.testing.assert_close(found.test, a["train_global"], **close, msg=str(path))
        torch.testing.assert_close(found.unit[:, 1:].transpose(0, 1), a["train_part"], **close)
        total = (found.test * a["grad_out_global"]).sum()
        total = total + (found.unit[:, 1:].transpose(0, 1) * a["grad_out_part"]).sum()
        total.backward()
        checked = 0
        for name, expected in a.items():
            if not name.startswith("grad.base."):
                continue
            ours = name.removeprefix("grad.base.").replace("sie_embed", "camera_embed")
            parameter = net.backbone.get_parameter(
                ours if ours == "camera_embed" else f"net.{ours}"
            )
            assert parameter.grad is not None
            error = parameter.grad - expected
            if ours == "patch_embed.conv.0.weight":
                assert error.norm() <= 1e-2 * expected.norm(), f"{path}: {name}"
            else:
                assert error.abs().max() <= 1e-4 * expected.abs().max(), f"{path}: {name}"
            checked += 1
        assert checked


def test_what_the_numbers_of_the_authors_cannot_show() -> None:
    net = model().backbone.net
    assert {m.eps for m in net.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.InstanceNorm2d))]
    assert {m.eps for m in norms} == {1e-5}
    assert {m.momentum for m in norms} == {0.1}
    activations = [m for m in net.modules() if isinstance(m, nn.GELU)]
    assert activations
    assert {m.approximate for m in activations} == {"none"}


def test_drop_path_grows_linearly_to_the_copied_layer() -> None:
    net = model(depth=5, drop_path=0.2)
    blocks = [*net.backbone.net.blocks, *(branch[0] for branch in net.head.branches)]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.2])


def test_branches_start_from_the_same_layer_and_do_not_share_it() -> None:
    first, second = model().head.branches
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_shapes_and_unit_length() -> None:
    found = model().eval()(Batch.of(images(3), torch.tensor([0, 1, 3])))
    assert found.test.shape == found.pre[:, 0].shape == (3, 24)
    assert found.unit[:, 1:].shape == (3, 5, 24)
    torch.testing.assert_close(found.test.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found.unit[:, 1:].norm(dim=2), torch.ones(3, 5))


def test_no_parts() -> None:
    net = model(head={"granularities": ()})
    assert net.num_parts == 0
    assert net(Batch.of(images(2), torch.zeros(2, dtype=torch.int64))).unit[:, 1:].shape == (
        2,
        0,
        24,
    )
    backbone = IBNViT((96, 48), num_cameras=4, **SMALL)
    plain = ReIDModel(backbone, BNNeckHead(backbone)).eval()
    other = IBNViT((96, 48), num_cameras=4, **SMALL)
    other.load_state_dict(backbone.state_dict())
    single = ReIDModel(other, TMGFHead(other, granularities=())).eval()
    camid = torch.tensor([0, 3])
    torch.testing.assert_close(
        single(Batch.of(images(2), camid)).test, plain(Batch.of(images(2), camid)).test
    )


def test_batch_of_one_image_in_training() -> None:
    net = model().train()
    found = net(Batch.of(images(1), torch.zeros(1, dtype=torch.int64)))
    assert found.test.shape == (1, 24)
    assert found.unit[:, 1:].shape == (1, 5, 24)
    assert bool(torch.isfinite(found.test).all())


def test_unknown_camera_gets_the_mean_embedding() -> None:
    net = model().eval()
    found = net(Batch.of(images(1).expand(3, -1, -1, -1), torch.tensor([-1, 4, 99])))
    with torch.no_grad():
        net.backbone.camera_embed[:] = net.backbone.camera_embed.mean(0)
    expected = net(Batch.of(images(1), torch.tensor([0])))
    torch.testing.assert_close(found.test, expected.test.expand(3, -1))


def test_the_camera_is_an_input() -> None:
    net = model().eval()
    found = net(Batch.of(images(1).expand(2, -1, -1, -1), torch.tensor([0, 1]))).test
    assert not torch.allclose(found[0], found[1])


def test_no_cameras_no_embedding() -> None:
    net = model(num_cameras=0).eval()
    assert net.backbone.camera_embed is None
    assert net(Batch.of(images(2), torch.tensor([-1, 5]))).test.shape == (2, 24)


@pytest.mark.parametrize("rows", [5, 6, 7])
def test_stripes_cover_every_row(rows: int) -> None:
    net = model(size=(16 * rows, 32), num_cameras=0, depth=1).eval()
    inside: list[Tensor] = []
    net.head.branches[0].register_forward_hook(lambda _, __, out: inside.append(out))
    net.head.branches[1].register_forward_hook(lambda _, __, out: inside.append(out))
    found = net(Batch.of(images(1, (16 * rows, 32)), torch.zeros(1, dtype=torch.int64)))
    start = 0
    for branch, count in enumerate((2, 3)):
        by_row = inside[branch][0, 1:].view(rows, 2, 24).mean(1)
        sizes = [rows // count + (i < rows % count) for i in range(count)]
        assert sum(sizes) == rows
        for i, stripe in enumerate(by_row.split(sizes)):
            neck = net.head.part_necks[start + i]
            expected = F.normalize(neck(stripe.mean(0, keepdim=True)), dim=1)
            torch.testing.assert_close(found.unit[:, 1:][:, start + i], expected)
        start += count


def test_errors_of_sizes_and_options() -> None:
    with pytest.raises(
        ValueError, match=r"multiples of the patch size 16, .* nearest is \[96, 48\]"
    ):
        IBNViT((100, 50))
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of 6, got 100"):
        IBNViT((96, 48), embed_dim=100)
    backbone = IBNViT((96, 48), **SMALL)
    with pytest.raises(ValueError, match="granularities: expected 1 to 6 stripes"):
        TMGFHead(backbone, granularities=(2, 7))
    with pytest.raises(ValueError, match="second needs two branches"):
        TMGFHead(backbone, duplicate_layer=False, global_fusion="second")
    with pytest.raises(ValueError, match="expected a ViT, got Linear"):
        TMGFHead(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected images of \(96, 48\), got \(96, 32\)"):
        backbone(Batch.of(images(1, (96, 32)), torch.zeros(1, dtype=torch.int64)))


def luperson(size: tuple[int, int]) -> dict[str, Tensor]:
    backbone = IBNViT(size, **SMALL)
    return {name.removeprefix("net."): value for name, value in backbone.state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"teacher": {f"module.backbone.{k}": v for k, v in state.items()}},
        lambda state: {"teacher": {f"backbone.{k}": v for k, v in state.items()}},
    ],
    ids=["plain", "model", "state_dict", "teacher", "teacher, one process"],
)
def test_luperson_layouts(tmp_path: Path, wrap: Any) -> None:
    state = luperson((128, 64))
    save_checkpoint(tmp_path / "lup.pth", wrap(state))
    backbone = IBNViT((96, 48), num_cameras=4, **SMALL)
    report = load_backbone_weights(backbone, tmp_path / "lup.pth")
    assert report.missing == ("camera_embed",)
    assert not report.unexpected
    assert [entry.split()[0] for entry in report.resized] == ["net.pos_embed"]
    assert len(report.loaded) == len(state) - 1
    torch.testing.assert_close(
        backbone.net.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"]
    )


def test_camera_embeddings_of_another_data_set_are_not_taken(tmp_path: Path) -> None:
    state = luperson((96, 48)) | {"sie_embed": torch.ones(8, 1, 24)}
    save_checkpoint(tmp_path / "lup.pth", state)
    backbone = IBNViT((96, 48), num_cameras=4, **SMALL)
    report = load_backbone_weights(backbone, tmp_path / "lup.pth")
    assert report.skipped == ("camera_embed",)
    assert backbone.camera_embed.abs().max() < 0.2


def test_weights_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "lup.pth", luperson((96, 48)))
    backbone = IBNViT((96, 48), **(SMALL | {"embed_dim": 48}))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(WeightsError, match=r"cls_token: file \(1, 1, 24\), model \(1, 1, 48\)"):
        load_backbone_weights(backbone, tmp_path / "lup.pth")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_cameras_of_a_checkpoint_are_counted(tmp_path: Path) -> None:
    net = model(num_cameras=7)
    save_checkpoint(tmp_path / "m.pth", net.state_dict())
    state, _ = read_checkpoint(tmp_path / "m.pth")
    assert IBNViT.count_cameras(state) == 7
    assert IBNViT.count_cameras({"backbone.camera_embed": torch.zeros(3, 1, 4)}) == 3
    assert IBNViT.count_cameras({"backbone.net.cls_token": torch.zeros(1, 1, 4)}) == 0


def test_mixed_precision_gives_float32_embeddings() -> None:
    net = model().train()
    with torch.autocast("cpu", torch.bfloat16):
        found = net(Batch.of(images(4), torch.zeros(4, dtype=torch.int64)))
    assert {tensor.dtype for tensor in found[:4]} == {torch.float32}
