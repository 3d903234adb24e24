"""TransReID's network, losses and schedule against the authors' numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.assembly.optimization import build_learning_rate
from reid.config import SolverConfig
from reid.modeling.formats import find_format, use_our_names
from reid.modeling.heads import BNNeckHead
from reid.modeling.losses import STUDENT, Criterion, CrossEntropy, Triplet
from reid.modeling.model import ReIDModel
from reid.modeling.vit import ViT, patch_grid, resize_position_embedding
from reid.modeling.weights import load_weights
from reid.projects.transreid import JPMHead, jigsaw_order
from reid.solver import LR_FACTOR, build_optimizer
from reid.structures import VIEW, Batch

Numbers = Mapping[str, Tensor]
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "drop_path": 0.0}


def read(path: Path) -> dict[str, Tensor]:
    arrays = np.load(path)
    return {
        name: torch.from_numpy(np.asarray(arrays[name]))
        for name in arrays
        if arrays[name].dtype.kind != "U"
    }


def authors_model(a: Numbers) -> tuple[ReIDModel, Criterion]:
    """Our network and losses with the weights of the authors."""
    state = {name.removeprefix("state."): v for name, v in a.items() if name.startswith("state.")}
    image = a["image"]
    cameras, views = int(a["cameras"]), int(a["views"])
    jigsaw = "b2.1.weight" in state
    backbone = ViT(
        (image.shape[2], image.shape[3]), num_cameras=cameras, camera_embedding=cameras > 0,
        num_views=views, patch_size=int(a["patch"]), patch_stride=int(a["stride"]),
        embed_dim=state["base.cls_token"].shape[2], depth=int(a["depth"]),
        num_heads=int(a["heads"]), drop_path=0.0, camera_scale=float(a["sie_weight"]),
    )  # fmt: skip
    head: nn.Module = BNNeckHead(backbone, neck_feature="before")
    if jigsaw:
        head = JPMHead(
            backbone,
            int(a["parts"]),
            int(a["shift_num"]),
            int(a["shuffle_group"]),
            rearrange=bool(a["rearrange"]),
        )
    model = ReIDModel(backbone, head)
    names = use_our_names(state)
    report = load_weights(model, names)
    assert not report.unexpected
    assert not report.missing
    return model, authors_losses(model, state)


def authors_losses(model: ReIDModel, state: Numbers) -> Criterion:
    classes = len(state["classifier.weight"])
    dim, parts = model.embed_dim, model.num_parts
    if not parts:
        entropy = CrossEntropy(dim, classes)
        losses = Criterion([entropy, Triplet()])
    else:
        entropy = CrossEntropy(dim, classes)
        local = CrossEntropy(dim, classes, banks="parts", num_parts=parts)
        losses = Criterion(
            [entropy, local, Triplet(), Triplet(banks="parts", num_parts=parts)],
            [0.5] * 4,
            ["", "part_cross_entropy", "", "part_triplet"],
        )
        for number, layer in enumerate(local.part_classifiers):
            layer.load_state_dict({"weight": state[f"classifier_{number + 1}.weight"]})
    assert entropy.classifier is not None
    entropy.classifier.load_state_dict({"weight": state["classifier.weight"]})
    return losses


def batch_of(a: Numbers, rows: Tensor) -> Batch:
    batch = Batch.of(a["image"][rows].float(), a["camid"][rows].long(), rows)
    return batch._replace(side={VIEW: a["viewid"][rows].long()})


def our_parameter(model: ReIDModel, losses: Criterion, name: str) -> Tensor:
    """A parameter or buffer by the authors' name."""
    if name.startswith("classifier"):
        number = int(name.removesuffix(".weight").partition("_")[2] or 0)
        entropies = [loss for loss in losses if isinstance(loss, CrossEntropy)]
        layer = entropies[0].classifier if not number else entropies[1].part_classifiers[number - 1]
        assert isinstance(layer, nn.Linear)
        return layer.weight
    # a whole file, since formats look at all names
    depth = len(model.backbone.net.blocks)
    frame = {"base.cls_token": torch.ones(1), f"base.blocks.{depth - 1}.x": torch.ones(1),
             "bottleneck.x": torch.ones(1)}  # fmt: skip
    if model.num_parts:
        frame |= {"b1.0.x": torch.ones(1), "bottleneck_1.x": torch.ones(1)}
    marked = torch.full((1,), 7.0)
    renamed = use_our_names(frame | {name: marked})
    (ours,) = [key for key, value in renamed.items() if value is marked]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return tensors[ours]


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    found = found.detach().reshape(expected.shape)
    error = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, f"{what}: {error}"


def label(losses: Criterion, pid: Tensor) -> None:
    """Labels without `set_labels`, since some of the classes are not in the batch."""
    for loss in losses:
        loss.cluster = pid.long()


def take_step(model: ReIDModel, losses: Criterion, batch: Batch) -> Tensor:
    values = losses({STUDENT: model(batch)}, batch)
    total = torch.stack([*values.values()]).sum()
    total.backward()
    return total.detach()


def network_files(oracle_dir: Path) -> list[Path]:
    files = sorted(p for p in oracle_dir.glob("transreid_*.npz") if "shuffle" not in p.stem)
    assert files
    return files


@pytest.mark.oracle
def test_outputs_losses_and_gradients_of_the_authors(oracle_dir: Path) -> None:
    for path in network_files(oracle_dir):
        a = read(path)
        model, losses = authors_model(a)
        batch = batch_of(a, torch.arange(len(a["image"])))
        with torch.no_grad():
            found = model.eval()(batch)
        close(found.test, F.normalize(a["eval_before"], dim=1), 1e-5, f"{path} test feature")
        parts = max(1, model.num_parts)
        share = torch.tensor([1.0] + [1 / parts] * model.num_parts)[:, None]
        close((found.pre * share).flatten(1), a["eval_before"], 1e-5, f"{path} before")
        close((found.post * share).flatten(1), a["eval_after"], 1e-5, f"{path} after")
        if model.num_parts:
            after = copy.deepcopy(model)
            after.head._neck_feature = "after"  # type: ignore[assignment]
            with torch.no_grad():
                test = after(batch).test
            close(test, F.normalize(a["eval_after"], dim=1), 1e-5, f"{path} test after")

        label(losses, a["pid"])
        found = model.train()(batch)
        close(found.pre.transpose(0, 1), a["train_feature"], 1e-5, f"{path} features")
        entropies = [loss for loss in losses if isinstance(loss, CrossEntropy)]
        layers = [layer for loss in entropies for layer in loss._classifiers()]
        scores = [layer(bank) for layer, bank in zip(layers, found.post.unbind(1), strict=True)]
        close(torch.stack(scores), a["train_score"], 1e-5, f"{path} scores")
        values = losses({STUDENT: found}, batch)
        total = torch.stack([*values.values()]).sum()
        close(total, a["loss"], 1e-5, f"{path} loss")
        triplet = torch.stack([v for name, v in values.items() if "triplet" in name]).sum()
        close(triplet, a["loss_triplet"], 1e-5, f"{path} triplet")
        close(total - triplet, a["loss_id"], 1e-5, f"{path} cross entropy")
        total.backward()
        for name, expected in a.items():
            if name.startswith("grad."):
                ours = our_parameter(model, losses, name.removeprefix("grad."))
                assert ours.grad is not None, name
                gradient = ours.grad.reshape(expected.shape)
                error = (gradient - expected).abs().max() / expected.abs().max()
                assert error <= 1e-4, f"{path} {name}: {float(error)}"
            if name.startswith("running_after."):
                theirs = name.removeprefix("running_after.")
                stem, _, kind = theirs.rpartition(".")
                ours = our_parameter(model, losses, f"{stem}.running_{kind}")
                close(ours, expected, 1e-5, f"{path} {name}")


@pytest.mark.oracle
def test_parameters_without_gradients_are_those_of_the_authors(oracle_dir: Path) -> None:
    """What gets no gradient there is not in our network."""
    for path in network_files(oracle_dir):
        a = read(path)
        unused = [str(name) for name in np.load(path)["no_grad"]]
        model, losses = authors_model(a)
        label(losses, a["pid"])
        take_step(model.train(), losses, batch_of(a, torch.arange(len(a["image"]))))
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        state = {n.removeprefix("state."): v for n, v in a.items() if n.startswith("state.")}
        written = use_our_names(state)
        # the bias of a neck is frozen on both sides
        assert {name for name in unused if "bottleneck" not in name} <= set(written.left_out)


@pytest.mark.oracle
def test_three_steps_of_the_authors(oracle_dir: Path) -> None:
    for path in network_files(oracle_dir):
        a = read(path)
        model, losses = authors_model(a)
        label(losses, a["pid"])
        rate = published_rate(float(a["base_lr"]))
        optimizer = build_optimizer(
            [*model.named_parameters(), *losses.named_parameters()], "SGD",
            lr=float(a["base_lr"]), momentum=0.9, weight_decay=1e-4, bias_lr_factor=2,
        )  # fmt: skip
        model.train()
        found = []
        for epoch, order in enumerate(a["step_order"].long()):
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch, epoch, group.get(LR_FACTOR, 1.0))
            optimizer.zero_grad()
            found.append(take_step(model, losses, batch_of(a, order)))
            optimizer.step()
        close(torch.stack(found), a["step_loss"], 1e-4, f"{path} losses")
        for name, expected in a.items():
            if name.startswith("step_after."):
                ours = our_parameter(model, losses, name.removeprefix("step_after."))
                close(ours, expected, 1e-4, f"{path} {name}")
        with torch.no_grad():
            test = model.eval()(batch_of(a, torch.arange(len(a["image"])))).test
        close(test, F.normalize(a["step_eval_before"], dim=1), 1e-4, f"{path} last features")


def published_rate(base_lr: float) -> Any:
    return build_learning_rate(
        SolverConfig(
            base_lr=base_lr, max_epochs=120, schedule="cosine", final_lr_factor=0.002,
            cosine_after_warmup=False, warmup_epochs=5, warmup_factor=0.01, schedule_offset=1,
        )
    )  # fmt: skip


@pytest.mark.oracle
def test_schedule_of_the_authors(oracle_dir: Path) -> None:
    for path in network_files(oracle_dir):
        a = read(path)
        assert int(a["warmup_epochs"]) == 5
        rate = published_rate(float(a["base_lr"]))
        found = [[rate(epoch, 0, factor) for factor in (1.0, 2.0)] for epoch in range(120)]
        assert np.abs(np.array(found) - a["schedule"].numpy()).max() <= 1e-9


def test_rates_of_the_facts_page() -> None:
    rate = published_rate(1.0)
    for epoch, expected in ((1, 0.208), (4, 0.802), (5, 0.995731), (60, 0.501), (119, 0.002171),
                            (120, 0.002)):  # fmt: skip
        assert rate(epoch - 1) == pytest.approx(expected, abs=1e-6)
    assert rate(0, 0, 2.0) == pytest.approx(0.408)
    assert rate(119, 0, 2.0) == pytest.approx(0.002)


@pytest.mark.oracle
def test_order_of_the_patches_and_position_embedding_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("transreid_shuffle*.npz"))
    assert files
    for path in files:
        for name, expected in read(path).items():
            kind, *numbers = name.split("_")
            if kind == "order":
                count, shift, groups = map(int, numbers)
                assert torch.equal(jigsaw_order(count, shift, groups), expected), f"{path} {name}"
            elif name != "pos_source":
                rows, columns = map(int, numbers[0].split("x"))
                found = resize_position_embedding(read(path)["pos_source"], (rows, columns))
                close(found, expected, 1e-6, f"{path} {name}")


def test_the_order_in_words() -> None:
    assert jigsaw_order(128, 5, 2)[:4].tolist() == [4, 68, 5, 69]
    # 208 of 210 patches: 108 and 3 are left out
    net = JPMHead(ViT((64, 32), patch_stride=2, **SMALL | {"patch_size": 4}), shift=5)
    count = net.order.numel()
    assert count % 4 == 0
    backbone = ViT((256, 128), patch_stride=12, **SMALL)
    assert backbone.grid == (21, 10)
    assert set(range(210)) - set(JPMHead(backbone).order.tolist()) == {108, 3}


@pytest.mark.parametrize(
    ("size", "stride", "grid"),
    [((256, 128), 16, (16, 8)), ((256, 128), 12, (21, 10)), ((256, 128), 11, (22, 11)),
     ((384, 128), 12, (31, 10))],
)  # fmt: skip
def test_patches_of_the_facts_page(
    size: tuple[int, int], stride: int, grid: tuple[int, int]
) -> None:
    assert patch_grid(size, 16, stride) == grid


def test_options_that_do_not_fit() -> None:
    backbone = ViT((48, 32), patch_size=8, **SMALL)  # 24 patches
    with pytest.raises(ValueError, match="shift: expected 1 to 24, the number of patches, got 0"):
        JPMHead(backbone, shift=0)
    with pytest.raises(ValueError, match=r"shift: expected 1 to 24, .* got 25"):
        JPMHead(backbone, shift=25)
    with pytest.raises(ValueError, match=r"divisor of the 24 patches or of 25, such as 1, 2, .* 7"):
        JPMHead(backbone, shuffle_groups=7)
    with pytest.raises(ValueError, match=r"num_groups: expected 1 to 24, .* got 25"):
        JPMHead(backbone, num_groups=25)
    with pytest.raises(ValueError, match="expected a ViT, got Linear"):
        JPMHead(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 2"):
        jigsaw_order(1, 1, 2)


def test_the_class_token_is_in_no_group_and_groups_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    backbone = ViT((48, 32), patch_size=8, **SMALL)
    head = JPMHead(backbone)
    assert int(head.order.min()) == 0
    assert int(head.order.max()) == 23
    model = ReIDModel(backbone, head).eval()
    image = torch.randn(4, 3, 48, 32)
    with torch.no_grad():
        together = model(Batch.of(image)).test
        alone = torch.cat([model(Batch.of(one[None])).test for one in image])
    torch.testing.assert_close(together, alone)


def test_the_local_layer_starts_as_the_last_one_and_is_another() -> None:
    backbone = ViT((48, 32), patch_size=8, **SMALL)
    head = JPMHead(backbone)
    last = [*backbone.net.blocks[-1].parameters(), *backbone.net.norm.parameters()]
    for one, other in zip(last, head.local.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_a_batch_of_one_image() -> None:
    backbone = ViT((48, 32), patch_size=8, **SMALL)
    found = ReIDModel(backbone, JPMHead(backbone)).train()(Batch.of(torch.randn(1, 3, 48, 32)))
    assert found.unit.shape == (1, 5, 24)
    assert found.test.shape == (1, 120)
    torch.testing.assert_close(found.test.norm(dim=1), torch.ones(1))


def test_checkpoints_of_the_authors_serve_a_plain_vit_too() -> None:
    torch.manual_seed(0)
    backbone = ViT((48, 32), patch_size=8, **SMALL)
    model = ReIDModel(backbone, JPMHead(backbone))
    theirs = {}
    for name, tensor in model.state_dict().items():
        theirs[authors_name(name, len(backbone.net.blocks) - 1)] = torch.rand_like(tensor.float())
    assert len(theirs) == len(model.state_dict())
    for ours in model.state_dict():  # theirs have the original last layer too, which nothing uses
        if "blocks.1." in ours or ".norm." in ours:
            theirs[ours.replace("backbone.net.", "base.")] = torch.zeros(1)
    written = find_format(theirs)
    assert written is not None
    assert written.name == "transreid-jpm"
    report = load_weights(model, use_our_names(theirs))
    assert not any((report.missing, report.unexpected))
    assert set(report.left_out.values()) == {"the branches' copies replace it"}
    other = ViT((48, 32), patch_size=8, **SMALL)
    plain = ReIDModel(other, BNNeckHead(other))
    report = load_weights(plain, use_our_names(theirs))
    assert not any((report.missing, report.unexpected))
    assert "local branch" in report.left_out.values()
    image = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        whole, alone = (net.eval()(Batch.of(image)) for net in (model, plain))
    torch.testing.assert_close(whole.pre[:, 0], alone.pre[:, 0])


def authors_name(name: str, last: int) -> str:
    for ours, theirs in (
        (f"backbone.net.blocks.{last}.", "b1.0."), ("backbone.net.norm.", "b1.1."),
        ("backbone.net.", "base."), ("head.local.", "b2."), ("head.neck.", "bottleneck."),
    ):  # fmt: skip
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    number, rest = name.removeprefix("head.part_necks.").split(".", 1)
    return f"bottleneck_{int(number) + 1}.{rest}"
