"""O2CAP: the published numbers with means by camera, and whole runs with both networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reid.config import load_config
from reid.projects.o2cap import O2CAPLoss

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.oracle
def test_losses_gradients_and_memory_of_the_authors(
    check_memory_loss: Callable[..., None],
) -> None:
    check_memory_loss(
        "o2cap_*.npz",
        lambda a: O2CAPLoss(
            a["temperature"], a["momentum"], a["balance"], num_positives=int(a["pos_k"]),
            num_negatives=int(a["neg_k"]), average="camera",
        ),
        {"global_offline": "off_loss", "global_online": "on_loss"},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["market", "duke", "msmt"])
def test_published_hyper_parameters(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "ProxyBalancedSampler", "batch_size": 32, "images_per_proxy": 4,
        "steps_per_epoch": 400,
    }  # fmt: skip
    assert config.clusterer == {
        "name": "CameraProxyClusterer", "k1": 20, "k2": 6, "eps": 0.5, "min_samples": 4,
    }  # fmt: skip
    assert config.criterion == [{
        "name": "O2CAPLoss", "temperature": 0.07, "momentum": 0.2, "balance": 0.15,
        "num_positives": 3, "num_negatives": 50, "average": "camera",
    }]  # fmt: skip
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 5e-4)
    assert (solver.max_epochs, solver.milestones, solver.warmup_epochs) == (50, [20, 40], 10)
    assert (solver.warmup_factor, solver.gamma, solver.amp) == (0.01, 0.1, "off")
    assert config.input.size == (256, 128)
    assert config.input.transforms[2] == {
        "name": "RandomErasing", "prob": 0.5, "area": [0.02, 0.4], "fill": "raw_mean",
    }  # fmt: skip
    assert config.model.backbone["last_stride"] == 1
    ibn = load_config(CONFIGS / f"{name}_ibn.yaml")
    assert ibn.model.backbone["norm"] == "ibn"
    assert (ibn.criterion, ibn.solver) == (config.criterion, config.solver)


@pytest.mark.parametrize("norm", ["batch", "ibn"])
def test_whole_run(train_tiny: Callable[..., Path], norm: str) -> None:
    backbone = f"{{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1, NORM: {norm}}}"
    folder = train_tiny(
        CONFIGS / "market.yaml", "o2cap", "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "3",
        "MODEL.BACKBONE", backbone, "SOLVER.MAX_EPOCHS", "1",
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    losses = next(line for line in lines if line["kind"] == "train")
    assert {"global_offline", "global_online"} <= losses.keys()
    assert "part_offline" not in losses
