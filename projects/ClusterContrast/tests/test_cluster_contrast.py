"""Cluster Contrast: the published numbers, data on which the published code fails, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.config import load_config
from reid.data.samplers import CrossCameraSampler
from reid.projects.clustercontrast import ClusterContrastLoss
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

PROJECTS = Path(__file__).parents[2]
CONFIGS = PROJECTS / "ClusterContrast" / "configs"
VIT_CONFIGS = PROJECTS / "TransReID_SSL" / "configs"


def step(
    loss: ClusterContrastLoss, labels: PseudoLabels, index: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    feature = F.normalize(torch.randn(len(labels), 8, generator=generator), dim=1)
    none = torch.full((len(labels),), -1)
    loss.set_labels(labels, FeatureSet.of(feature, none, none))
    given = torch.randn(len(index), 8, generator=generator).requires_grad_()
    found = loss(
        Embeddings(given[:, None], given[:, None], given[:, None], given),
        Batch.of(given, index=index),
    )
    torch.stack([*found.values()]).sum().backward()
    assert given.grad is not None
    return found, given.grad


@pytest.mark.oracle
def test_losses_gradients_and_memory_of_the_authors(
    check_memory_loss: Callable[..., None],
) -> None:
    check_memory_loss(
        "clustercontrast_*.npz",
        lambda a: ClusterContrastLoss(
            a["temperature"], a["momentum"], "hard" if a["use_hard"] else "sequential"
        ),
        {},
    )


def test_one_cluster_gives_exactly_nothing() -> None:
    for update in ("sequential", "hard"):
        labels = PseudoLabels.from_clusters(torch.zeros(6, dtype=torch.int64))
        found, gradient = step(ClusterContrastLoss(update=update), labels, torch.arange(6))
        assert found["global_contrast"] == 0
        assert bool((gradient == 0).all())


def test_cameras_do_not_split_the_memory() -> None:
    cluster, camids = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 3, 7, 0, 3, 12])
    loss, blind = ClusterContrastLoss(), ClusterContrastLoss()
    found, gradient = step(loss, PseudoLabels.from_clusters(cluster, camids), torch.arange(6))
    other, same = step(blind, PseudoLabels.from_clusters(cluster), torch.arange(6))
    assert loss.memory.rows.shape == (1, 2, 8)
    assert torch.equal(found["global_contrast"], other["global_contrast"])
    assert torch.equal(gradient, same)


def test_no_label_at_all_is_an_error() -> None:
    labels = PseudoLabels.from_clusters(torch.full((4,), -1))
    with pytest.raises(ValueError, match="ClusterContrastLoss: none of 4 images has a label"):
        step(ClusterContrastLoss(), labels, torch.arange(4))


@pytest.mark.parametrize(("name", "steps"), [("market", 200), ("duke", 200), ("msmt", 400)])
def test_published_hyper_parameters(name: str, steps: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "CrossCameraSampler", "batch_size": 256, "images_per_identity": 16,
        "steps_per_epoch": steps,
    }  # fmt: skip
    assert config.clusterer is not None
    assert [config.clusterer[key] for key in ("k1", "k2", "eps", "min_samples")] == [30, 6, 0.6, 4]
    (loss,) = config.criterion
    assert (loss["temperature"], loss["momentum"], loss["update"]) == (0.05, 0.1, "sequential")
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 5e-4)
    assert (solver.max_epochs, solver.milestones, solver.warmup_epochs) == (50, [20, 40], 0)
    assert (solver.gamma, solver.amp) == (0.1, "off")
    backbone = config.model.backbone
    assert (backbone["pool"], backbone["last_stride"]) == ("gem", 1)
    assert config.model.bn_samples_per_group == 64
    assert config.input.size == (256, 128)
    assert config.input.transforms[2] == {
        "name": "RandomErasing", "prob": 0.5, "area": [0.02, 0.4], "fill": "raw_mean",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "eps", "group", "stem"),
    [
        ("usl_market", 0.6, 64, "patches"),
        ("usl_market_stem", 0.6, 64, "ibn"),
        ("usl_msmt", 0.7, 128, "patches"),
        ("usl_msmt_stem", 0.7, 128, "ibn"),
    ],
)
def test_published_hyper_parameters_of_the_vit(
    name: str, eps: float, group: int, stem: str
) -> None:
    config = load_config(VIT_CONFIGS / f"{name}.yaml")
    sampler, solver, backbone = config.dataloader.sampler, config.solver, config.model.backbone
    assert (sampler["batch_size"], sampler["images_per_identity"]) == (256, 8)
    assert sampler["steps_per_epoch"] == 200
    assert config.clusterer is not None
    assert [config.clusterer[key] for key in ("k1", "k2", "eps", "min_samples")] == [30, 6, eps, 4]
    (loss,) = config.criterion
    assert (loss["temperature"], loss["momentum"], loss["update"]) == (0.05, 0.2, "hard")
    assert (solver.optimizer, solver.base_lr, solver.momentum) == ("SGD", 3.5e-4, 0.9)
    assert (solver.max_epochs, solver.milestones, solver.warmup_epochs) == (50, [20, 40], 0)
    assert (backbone["stem"], backbone["drop_path"]) == (stem, 0.3)
    assert not backbone["camera_embedding"]
    assert config.model.bn_samples_per_group == group
    assert config.input.pixel_std == (0.5, 0.5, 0.5)


def test_whole_runs(train_tiny: Callable[..., Path]) -> None:
    sampler = "{NAME: CrossCameraSampler, BATCH_SIZE: 16, STEPS_PER_EPOCH: 3}"
    resnet = "{NAME: TimmBackbone, MODEL: test_resnet, POOL: gem, LAST_STRIDE: 1}"
    vit = "{NAME: ViT, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 2, CAMERA_EMBEDDING: false}"
    vit_file = VIT_CONFIGS / "usl_market.yaml"
    for file, backbone in ((CONFIGS / "market.yaml", resnet), (vit_file, vit)):
        folder = train_tiny(
            file, file.stem, "DATALOADER.SAMPLER", sampler, "MODEL.BACKBONE", backbone,
            "MODEL.BN_SAMPLES_PER_GROUP", "8",
        )  # fmt: skip
        lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        losses = [line["global_contrast"] for line in lines if line["kind"] == "train"]
        assert losses
        assert min(losses) > 0
        assert (folder / "model_final.safetensors").is_file()


def test_fewer_clusters_than_a_batch_takes() -> None:
    sampler = CrossCameraSampler(64, images_per_identity=4, steps_per_epoch=2)
    sampler.set_labels(PseudoLabels.from_clusters(torch.arange(12) // 4, torch.arange(12) % 2))
    assert [len(batch) for batch in sampler] == [64, 64]
