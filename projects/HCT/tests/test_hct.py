"""HCT: our double-precision writing of its steps, data that break a plain one, a small run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.config import load_config
from reid.engine.hooks.checkpoints import checkpoint_paths, epoch_of
from reid.labelling import ClusteringError
from reid.labelling.merging import AverageLinkage, merge_step
from reid.modeling.triplets import batch_hard_triplet
from reid.modeling.weights import read_checkpoint
from reid.projects.hct import HierarchicalClusterer
from reid.structures import FeatureSet

CONFIGS = Path(__file__).parents[1] / "configs"


def read(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def units(count: int) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.mark.oracle
def test_steps_of_the_oracle(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("hct_average*.npz"))
    assert files
    for path in files:
        a = read(path)
        feature = a["feature"].float()
        count, merges = len(feature), int(a["num_to_merge"])
        for steps in range(1, int(a["steps"]) + 1):
            clusterer = HierarchicalClusterer((merges + 0.5) / count, steps)
            found = clusterer(FeatureSet.of(feature)).cluster
            assert found.tolist() == a[f"step{steps - 1}.label_after"].tolist(), (path, steps)


@pytest.mark.oracle
def test_one_by_one_is_classical_average_linkage(oracle_dir: Path) -> None:
    for path in sorted(oracle_dir.glob("hct_average*.npz")):
        a = read(path)
        feature, label = a["feature"].float(), a["one_by_one_label"].numpy()
        whole = torch.cdist(
            feature.double(), feature.double(), compute_mode="donot_use_mm_for_euclid_dist"
        ).numpy()
        cluster = np.arange(len(feature))
        for height in a["one_by_one_height"].tolist()[: len(feature) - len(np.unique(label))]:
            new = merge_step(AverageLinkage(feature, cluster), 1)
            one, other = np.flatnonzero(new == np.bincount(new).argmax())
            mean = whole[np.ix_(cluster == one, cluster == other)].mean()
            assert mean == pytest.approx(height, abs=1e-6), path
            cluster = new[cluster]
        pairs = np.unique(np.stack((cluster, label)), axis=1).shape[1]
        assert pairs == len(np.unique(cluster)) == len(np.unique(label)), path


@pytest.mark.oracle
def test_triplet_batches_of_the_oracle(oracle_dir: Path) -> None:
    for path in sorted(oracle_dir.glob("hct_average*.npz")):
        a = read(path)
        for number in range(2):
            given = {k.split(".")[1]: v for k, v in a.items() if k.startswith(f"triplet{number}.")}
            e = given["feature"].float().requires_grad_()
            value = batch_hard_triplet(e, given["label"].long(), float(given["margin"]))
            value.backward()
            assert float(value.detach()) == pytest.approx(float(given["loss"]), rel=1e-5), path
            assert e.grad is not None
            scale = float(given["grad"].abs().max())
            assert float((e.grad - given["grad"]).abs().max()) <= 1e-4 * scale, path


def test_too_few_images_are_told() -> None:
    with pytest.raises(ClusteringError, match=r"0\.07 of 14 images is less than one cluster"):
        HierarchicalClusterer()(FeatureSet.of(units(14)))
    assert HierarchicalClusterer()(FeatureSet.of(units(15))).num_clusters == 2
    for options in ((0.0, 1), (0.1, 0), (0.1, 10), (0.5, 2)):
        with pytest.raises(ValueError, match="expected steps of 1 or more"):
            HierarchicalClusterer(*options)


def test_equal_images_merge_first() -> None:
    feature = units(8)[[0, 1, 2, 0, 3, 1, 4, 5, 6, 7]]
    assert HierarchicalClusterer(0.1, 2)(FeatureSet.of(feature)).cluster.tolist() == [
        0, 1, 2, 0, 3, 1, 4, 5, 6, 7,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["market", "duke", "msmt"])
def test_settings(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert (config.rounds, config.solver.max_epochs) == (10, 200)
    assert config.clusterer == {"name": "HierarchicalClusterer", "merge_share": 0.07, "steps": 13}
    assert config.criterion == [{"name": "Triplet", "margin": 0.5, "feature": "after"}]
    solver = config.of_stage(0).solver
    assert (solver.base_lr, solver.lr_factors, solver.nesterov) == (6e-5, {"head": 10.0}, True)
    assert (solver.max_epochs, solver.milestones, solver.warmup_epochs) == (20, [], 0)
    sampler = config.dataloader.sampler
    assert (sampler["batch_size"], sampler["images_per_identity"]) == (64, 4)
    assert config.model.backbone["last_stride"] == 1


def test_a_small_run_resumes_within_a_round(train_tiny: Callable[..., Path]) -> None:
    pairs: Any = (
        "MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet}", "MODEL.HEAD.DIM", "16",
        "CLUSTERER", "{NAME: HierarchicalClusterer, MERGE_SHARE: 0.1, STEPS: 7}",
        "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "CHECKPOINT_KEEP", "0",
        "STAGES.0.EPOCHS", "2", "ROUNDS", "2", "SOLVER.MAX_EPOCHS", "4", "TEST.EVAL_PERIOD", "0",
    )  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    expected, _ = read_checkpoint(whole / "model_final.safetensors")
    for path in checkpoint_paths(whole):
        if epoch_of(path) > 3:
            path.unlink()
    (whole / "model_final.safetensors").unlink()
    train_tiny(CONFIGS / "market.yaml", "whole", *pairs, resume=True)
    found, _ = read_checkpoint(whole / "model_final.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
