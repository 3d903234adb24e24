"""CAP: the published numbers, data on which the published code fails, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.config import load_config
from reid.modeling.losses import STUDENT, Criterion
from reid.modeling.weights import read_checkpoint
from reid.projects.cap import CAPLoss
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"


def problem(proxies_of: list[tuple[int, int]], images: int = 3) -> tuple[PseudoLabels, FeatureSet]:
    """Images of proxies given as (cluster, camera); cluster -1 = outliers."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.tensor([c for c, _ in proxies_of]).repeat_interleave(images)
    camids = torch.tensor([c for _, c in proxies_of]).repeat_interleave(images)
    feature = F.normalize(torch.randn(len(cluster), 8, generator=generator), dim=1)
    features = FeatureSet.of(feature, torch.full_like(cluster, -1), camids)
    return PseudoLabels.from_clusters(cluster, camids), features


def plain_losses(
    f: Tensor, y: int, bank: Tensor, labels: PseudoLabels, negatives: int = 50
) -> tuple[Tensor, Tensor]:
    """Intra and inter loss of one sample, as the paper writes them."""
    z = bank @ f / 0.07
    camera, cluster = labels.proxy_to_camera, labels.proxy_to_cluster
    intra = torch.logsumexp(z[camera == camera[y]], 0) - z[y]
    positive = cluster == cluster[y]
    hardest = z[~positive].sort(descending=True).values[:negatives]
    total = torch.logsumexp(torch.cat((z[positive], hardest)), 0)
    return intra, 0.5 * (total - z[positive]).mean()


@pytest.mark.oracle
def test_losses_gradients_and_memory_of_the_authors(
    check_memory_loss: Callable[..., None],
) -> None:
    check_memory_loss(
        "cap_*.npz",
        lambda a: CAPLoss(
            a["temperature"], a["momentum"], a["inter_weight"], 0 if a["with_inter"] else 1,
            int(a["neg_k"]),
        ),
        {"global_intra": "intra_loss", "global_inter": "inter_loss"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("proxies_of", "what"),
    [
        ([(c, k) for c in range(30) for k in range(3)], "more than 50 negatives"),
        ([(c, k) for c in range(4) for k in range(3)], "fewer than 50 others"),
        ([(c, k) for c in range(4) for k in (2, 7, 12)], "camera ids with gaps"),
        ([(c, 0) for c in range(5)], "one camera"),
        ([(c, -1) for c in range(5)], "cameras unknown"),
        ([(0, 0), (0, 1), (0, 3)], "one cluster"),
        ([(0, 0), (1, 0), (1, 2), (-1, 1), (-1, 4)], "cameras with outliers only"),
    ],
)
def test_losses_are_the_definition(proxies_of: list[tuple[int, int]], what: str) -> None:
    labels, features = problem(proxies_of)
    loss = CAPLoss(inter_from_epoch=0)
    loss.set_labels(labels, features)
    bank = loss.memory.rows[0]
    index = torch.arange(0, len(labels), 2)
    feature = F.normalize(torch.randn(len(index), 8, generator=torch.Generator().manual_seed(1)))
    feature.requires_grad_()
    found = loss(
        Embeddings(feature[:, None], feature[:, None], feature[:, None], feature),
        Batch.of(feature, index=index),
    )
    by_camera: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for f, y in zip(feature.detach(), labels.proxy[index].tolist(), strict=True):
        if y >= 0:
            camera = int(labels.proxy_to_camera[y])
            by_camera.setdefault(camera, []).append(plain_losses(f, y, bank, labels))
    for place, name in enumerate(("global_intra", "global_inter")):
        values = [torch.stack([each[place] for each in losses]) for losses in by_camera.values()]
        means = [value.mean() for value in values]
        torch.testing.assert_close(found[name].detach(), torch.stack(means).sum(), msg=what)
    torch.stack([*found.values()]).sum().backward()
    assert feature.grad is not None
    assert bool(torch.isfinite(feature.grad).all()), what


def test_the_inter_camera_loss_begins_in_its_epoch() -> None:
    labels, features = problem([(c, k) for c in range(4) for k in range(3)])
    loss = CAPLoss()
    criterion = Criterion([loss])
    loss.set_labels(labels, features)
    feature, index = features.test[:4], torch.arange(4)
    for epoch, begun in ((0, False), (4, False), (5, True), (49, True)):
        criterion.set_epoch(epoch)
        bank = feature[:, None]
        given = {STUDENT: Embeddings(bank, bank, bank, feature)}
        found = criterion(given, Batch.of(feature, index=index))
        assert bool(found["global_inter"] > 0) == begun


def test_options_are_checked() -> None:
    for options in ({"inter_weight": -1.0}, {"inter_from_epoch": -1}, {"num_negatives": 0},
                    {"average": "sum"}, {"momentum": 2.0}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(options))}.*expected|expected.*inter"):
            CAPLoss(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["market", "duke", "msmt"])
def test_published_hyper_parameters(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "ProxyBalancedSampler", "batch_size": 32, "images_per_proxy": 4,
        "steps_per_epoch": None,
    }  # fmt: skip
    assert config.clusterer == {
        "name": "CameraProxyClusterer", "k1": 20, "k2": 6, "eps": 0.5, "min_samples": 4,
    }  # fmt: skip
    assert config.criterion == [{
        "name": "CAPLoss", "temperature": 0.07, "momentum": 0.2, "inter_weight": 0.5,
        "inter_from_epoch": 5, "num_negatives": 50, "average": "camera",
    }]  # fmt: skip
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 5e-4)
    assert (solver.max_epochs, solver.milestones, solver.warmup_epochs) == (50, [20, 40], 10)
    assert (solver.warmup_factor, solver.gamma, solver.amp) == (0.01, 0.1, "off")
    backbone = config.model.backbone
    assert (backbone["last_stride"], backbone["stem_activation"]) == (1, False)
    assert config.input.size == (256, 128)
    assert config.input.transforms[2] == {
        "name": "RandomErasing", "prob": 0.5, "area": [0.02, 0.2], "aspect": [0.3, 3.0],
        "fill": "raw_mean",
    }  # fmt: skip


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    backbone = "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1, STEM_ACTIVATION: false}"
    pairs = ("MODEL.BACKBONE", backbone, "CRITERION.0.INTER_FROM_EPOCH", "1",
             "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2")  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    inter = {line["epoch"]: line["global_inter"] for line in lines if line["kind"] == "train"}
    assert inter[0] == 0 < inter[1]
    stopped = train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "1")
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, _ = read_checkpoint(whole / "model_final.safetensors")
    other, _ = read_checkpoint(stopped / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
