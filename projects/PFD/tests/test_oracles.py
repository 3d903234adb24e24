"""PFD's network and losses against the authors' numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.modeling.formats import find_format, use_our_names
from reid.modeling.losses import CrossEntropy
from reid.modeling.model import ReIDModel
from reid.modeling.vit import ViT
from reid.modeling.weights import load_weights
from reid.projects.pfd import HEATMAP, PFDHead, PFDLoss
from reid.projects.pfd.matching import Slots
from reid.structures import Batch

pytestmark = pytest.mark.oracle
Numbers = Mapping[str, Tensor]


def files(folder: Path) -> list[tuple[Path, dict[str, Tensor]]]:
    paths = sorted(folder.glob("pfd_*.npz"))
    assert paths
    found = []
    for path in paths:
        arrays = np.load(path)
        numbers = {
            name: torch.from_numpy(np.asarray(arrays[name]))
            for name in arrays
            if arrays[name].dtype.kind != "U"
        }
        found.append((path, numbers))
    return found


def state_of(a: Numbers) -> dict[str, Tensor]:
    return {n.removeprefix("state."): v for n, v in a.items() if n.startswith("state.")}


def authors_model(a: Numbers) -> tuple[ReIDModel, PFDLoss]:
    """Our network and losses with the weights of the authors."""
    state = state_of(a)
    heatmap, image = a["heatmap"], a["image"]
    backbone = ViT(
        (image.shape[2], image.shape[3]), num_cameras=int(a["cameras"]), camera_embedding=True,
        patch_size=int(a["patch"]), patch_stride=int(a["stride"]),
        embed_dim=state["base_vit.cls_token"].shape[2], depth=int(a["depth"]), mlp_ratio=2.0,
        num_heads=int(a["heads"]), drop_path=0.0, camera_scale=float(a["sie_weight"]),
    )  # fmt: skip
    head = PFDHead(
        backbone, heatmap_size=(heatmap.shape[2], heatmap.shape[3]),
        hidden_below=float(a["threshold"]), decoder_layers=int(a["decoder_layers"]),
        decoder_heads=int(a["decoder_heads"]), dropout=0.0,
        decoder_width=len(state["transformerdecoder.layers.0.linear1.weight"]),
    )  # fmt: skip
    model = ReIDModel(backbone, head)
    report = load_weights(model, use_our_names(state))
    assert not any((report.unexpected, report.missing))
    loss = PFDLoss(model.embed_dim, model.num_parts, len(state["classifier_encoder.weight"]))
    for half, name in ((loss.parts, "classifier"), (loss.slots, "classifier_decoder")):
        whole, _, parts, _ = half
        assert isinstance(whole, CrossEntropy)
        assert isinstance(parts, CrossEntropy)
        first = "classifier_encoder" if name == "classifier" else name
        layers = whole._classifiers() + parts._classifiers()
        for layer, theirs in zip(
            layers, [first, *(f"{name}_{i}" for i in range(1, 18))], strict=True
        ):
            layer.load_state_dict({"weight": state[f"{theirs}.weight"]})
    return model, loss


def batch_of(a: Numbers) -> Batch:
    batch = Batch.of(a["image"].float(), a["camid"].long())
    return batch._replace(side={HEATMAP: a["heatmap"].float()})


def slots_of(model: ReIDModel, batch: Batch) -> Slots:
    """The slots before they are sorted."""
    head, tokens = model.head, model.backbone(batch).tokens
    assert isinstance(head, PFDHead)
    heatmap = head._heatmaps(batch)
    weight = F.adaptive_avg_pool1d(heatmap.mean(1), head.embed_dim)[:, None]
    return head.slots(head._parts(tokens), tokens * weight, heatmap)


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    error = float((found.detach() - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, f"{what}: {error}"


def our_name(name: str, state: Mapping[str, Tensor]) -> str:
    """Our name of a tensor of the authors; formats look at all names of a file."""
    marked = torch.full((1,), 7.0)
    renamed = use_our_names({**state, name: marked})
    (ours,) = [key for key, value in renamed.items() if value is marked]
    return ours


def test_features_of_the_authors(oracle_dir: Path) -> None:
    for path, a in files(oracle_dir):
        model, _ = authors_model(a)
        batch = batch_of(a)
        with torch.no_grad():
            found, slots = model.eval()(batch), slots_of(model, batch)
        close(found.test, F.normalize(a["eval_feature"], dim=1), f"{path} test feature")
        close(slots.fused, a["eval_pfa_feature"], f"{path} parts with poses")
        close(slots.feature, a["eval_pvm_feature"], f"{path} slots")
        assert torch.equal(slots.view, a["eval_pvm_index"].long()), path


def test_losses_and_gradients_of_the_authors(oracle_dir: Path) -> None:
    for path, a in files(oracle_dir):
        state = state_of(a)
        model, loss = authors_model(a)
        batch = batch_of(a)
        for part in (loss, *loss.parts, *loss.slots):
            part.cluster = a["pid"].long()
        with torch.no_grad():
            assert torch.equal(slots_of(model.train(), batch).view, a["train_pvm_index"].long())
        found = model(batch)
        close(found.pre.transpose(0, 1), a["train_encoder_feature"], f"{path} parts")
        slots = found.aux["slots_pre"].transpose(0, 1)
        close(slots, a["train_decoder_feature"], f"{path} slots")
        close(found.aux["hidden"], a["train_occluded_feature"], f"{path} hidden")
        for half, post, name in ((loss.parts, found.post, "encoder"),
                                 (loss.slots, found.aux["slots_post"], "decoder")):  # fmt: skip
            layers = [layer for part in half if isinstance(part, CrossEntropy)
                      for layer in part._classifiers()]  # fmt: skip
            scores = [layer(bank) for layer, bank in zip(layers, post.unbind(1), strict=True)]
            close(torch.stack(scores), a[f"train_{name}_score"], f"{path} {name} scores")
        values = loss(found, batch)
        close(2 * values["pfd_parts"], a["loss_encoder"], f"{path} loss of the parts")
        close(2 * values["pfd_slots"], a["loss_decoder"], f"{path} loss of the slots")
        close(values["pfd_hidden"], a["loss_push"], f"{path} loss of the hidden")
        total = torch.stack([*values.values()]).sum()
        close(total, a["loss"], f"{path} loss")
        total.backward()
        parameters = dict(model.named_parameters())
        for name, expected in a.items():
            if not name.startswith("grad."):
                continue
            theirs = name.removeprefix("grad.")
            if theirs == "classifier_decoder_2.weight":
                parts = loss.slots[2]
                assert isinstance(parts, CrossEntropy)
                gradient = parts._classifiers()[1].weight.grad
            else:
                gradient = parameters[our_name(theirs, state)].grad
            assert gradient is not None, name
            error = (gradient.reshape(expected.shape) - expected).abs().max() / expected.abs().max()
            assert error <= 1e-3, f"{path} {name}: {float(error)}"


def test_parameters_without_gradients_are_those_of_the_authors(oracle_dir: Path) -> None:
    """What gets no gradient there is not in our network."""
    for path, a in files(oracle_dir):
        model, loss = authors_model(a)
        for part in (loss, *loss.parts, *loss.slots):
            part.cluster = a["pid"].long()
        batch = batch_of(a)
        torch.stack([*loss(model.train()(batch), batch).values()]).sum().backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        unused = {str(name) for name in np.load(path)["no_grad"]}
        assert unused <= set(use_our_names(state_of(a)).left_out)


def test_checkpoints_of_the_authors_load_by_name(oracle_dir: Path) -> None:
    for path, a in files(oracle_dir):
        state = state_of(a)
        written = find_format(state)
        assert written is not None
        assert written.name == "pfd", path
