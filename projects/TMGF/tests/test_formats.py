"""The authors' checkpoints, converted to our safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reid.modeling.convert import convert_weights
from reid.modeling.model import ReIDModel
from reid.modeling.weights import load_weights, read_checkpoint
from reid.projects.tmgf import IBNViT, TMGFHead
from reid.structures import Batch


def model(copies: bool, cameras: int = 4) -> ReIDModel:
    backbone = IBNViT(
        (96, 48), num_cameras=cameras, embed_dim=24, depth=3, num_heads=3, stem_channels=16
    )
    return ReIDModel(backbone, TMGFHead(backbone, duplicate_layer=copies)).eval()


@pytest.mark.parametrize("copies", [True, False])
def test_conversion_gives_the_same_features(tmp_path: Path, copies: bool) -> None:
    torch.manual_seed(0)
    source = model(copies)
    names = {"backbone.camera_embed": "base.sie_embed", "backbone.net.": "base.",
             "head.neck.": "bottleneck.", "head.part_necks.": "part_bns."}  # fmt: skip
    names |= (
        {"head.branches.0.": "b1.", "head.branches.1.": "b2."}
        if copies
        else {"head.branches.0.0.": "base.blocks.2.", "head.branches.0.1.": "base.norm."}
    )
    state = {}
    for name, value in source.state_dict().items():
        ours, theirs = next(pair for pair in names.items() if name.startswith(pair[0]))
        state[theirs + name.removeprefix(ours)] = value
    if copies:  # the authors' file also holds the layer that the branches copied
        for branch, old in (("b1.0.", "base.blocks.2."), ("b1.1.", "base.norm.")):
            state |= {
                name.replace(branch, old): torch.zeros_like(value)
                for name, value in state.items()
                if name.startswith(branch)
            }
    torch.save({"state_dict": state}, tmp_path / "authors.pth")
    report = convert_weights(tmp_path / "authors.pth", tmp_path / "ours.safetensors")
    assert report.written.name == ("tmgf" if copies else "tmgf-one-branch")
    assert report.metadata["num_cameras"] == "4"
    target = model(copies)
    load_weights(target, read_checkpoint(tmp_path / "ours.safetensors")[0])
    image, camid = torch.randn(2, 3, 96, 48), torch.tensor([0, 3])
    batch = Batch.of(image, camid)
    for ours, theirs in zip(target(batch)[:4], source(batch)[:4], strict=True):
        assert torch.equal(ours, theirs)
    report = load_weights(model(copies), read_checkpoint(tmp_path / "authors.pth")[0])
    assert not report.unexpected + report.missing
    # twelve tensors of the last layer and two of the norm
    assert [*report.left_out.values()] == ["the branches' copies replace it"] * (14 * copies)


@pytest.mark.oracle
def test_names_of_the_authors_are_all_known(oracle_dir: Path, tmp_path: Path) -> None:
    for path in sorted(oracle_dir.glob("model_*.npz")):
        arrays = np.load(path)
        state = {
            name.removeprefix("state."): torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith("state.")
        }
        torch.save(state, tmp_path / "authors.pth")
        report = convert_weights(tmp_path / "authors.pth", tmp_path / "ours.safetensors")
        assert not report.unmapped + report.missing, path
