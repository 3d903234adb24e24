"""TransReID's published settings, and small runs with and without identities."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid.assembly.network import build_trained_model
from reid.config import load_config
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.modeling.weights import read_checkpoint
from reid.structures import DataError
from reid.workflows.evaluate import evaluate as run_test

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = (
    "MODEL.BACKBONE.EMBED_DIM", "24", "MODEL.BACKBONE.DEPTH", "2", "MODEL.BACKBONE.NUM_HEADS", "3",
    "MODEL.BACKBONE.PATCH_SIZE", "8", "MODEL.BACKBONE.PATCH_STRIDE", "6", "SOLVER.AMP", "off",
    "MODEL.BACKBONE.DROP_PATH", "0.1", "SOLVER.WARMUP_EPOCHS", "1",
)  # fmt: skip
SUPERVISED = ("CLUSTERER", "null")


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [
        ("market", (384, 128), 12), ("duke", (384, 128), 12), ("msmt", (384, 128), 12),
        ("market_256", (256, 128), 12), ("duke_256", (256, 128), 12),
        ("msmt_256", (256, 128), 12), ("occluded_duke", (256, 128), 11),
    ],
)  # fmt: skip
def test_published_settings(name: str, size: tuple[int, int], stride: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.input.size == size
    assert config.input.pixel_mean == config.input.pixel_std == (0.5, 0.5, 0.5)
    assert (config.input.interpolation, config.input.test_interpolation) == ("bicubic", "bilinear")
    assert config.model.backbone == {
        "name": "ViT", "stem": "patches", "patch_size": 16, "patch_stride": stride,
        "embed_dim": 768, "depth": 12, "num_heads": 12, "drop_path": 0.1,
        "camera_embedding": True, "camera_scale": 3.0,
    }  # fmt: skip
    assert config.model.head == {"name": "JPMHead", "num_groups": 4, "shift": 5,
                                 "shuffle_groups": 2, "neck_feature": "before"}  # fmt: skip
    names = [(loss["name"], loss["banks"], loss["weight"]) for loss in config.criterion]
    assert names == [("CrossEntropy", "global", 0.5), ("CrossEntropy", "parts", 0.5),
                     ("Triplet", "global", 0.5), ("Triplet", "parts", 0.5)]  # fmt: skip
    assert [loss.get("smoothing", loss.get("margin")) for loss in config.criterion] == [
        0, 0, None, None]  # fmt: skip
    solver = config.solver
    assert [solver.optimizer, solver.base_lr, solver.bias_lr_factor, solver.momentum,
            solver.weight_decay, solver.max_epochs, solver.schedule, solver.final_lr_factor,
            solver.cosine_after_warmup, solver.schedule_offset, solver.warmup_epochs,
            solver.warmup_factor, solver.amp, config.seed] == [
        "SGD", 8e-3, 2, 0.9, 1e-4, 120, "cosine", 0.002, False, 1, 5, 0.01, "fp16", 1234
    ]  # fmt: skip
    assert config.dataloader.sampler == {"name": "RandomIdentitySampler", "batch_size": 64,
                                         "images_per_identity": 4, "epoch": "round"}  # fmt: skip
    erasing = config.input.transforms[2]
    assert (erasing["name"], erasing["prob"], erasing["fill"]) == ("RandomErasing", 0.5, "noise")


def test_settings_for_vehicles() -> None:
    cameras, views = (load_config(CONFIGS / f"{name}.yaml") for name in ("veri", "veri_views"))
    for config in (cameras, views):
        assert config.input.size == (256, 256)
        assert config.model.head["shift"] == 8
        assert (config.solver.base_lr, config.solver.max_epochs) == (0.01, 120)
    assert cameras.datasets.train["name"] == "VeRi776"
    assert "num_views" not in cameras.model.backbone
    assert views.datasets.train["name"] == "CSV"
    assert views.model.backbone["num_views"] == 8


def test_a_small_supervised_run(train_tiny: Callable[..., Path]) -> None:
    pairs = (*TINY, *SUPERVISED)
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    names = {"cross_entropy", "part_cross_entropy", "triplet", "part_triplet"}
    assert all(math.isfinite(line[name]) for line in steps for name in names)
    assert steps[-1]["lr"] == pytest.approx(8e-3 * 0.002)  # the last epoch has the final rate


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    pairs = (*TINY, *SUPERVISED, "SOLVER.SCHEDULE", "multistep", "SOLVER.MILESTONES", "[1]")
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "1")
    two = train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, other = (read_checkpoint(f / "model_final.safetensors")[0] for f in (whole, two))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("plugin", "loss"),
    [("o2cap", "O2CAPLoss"), ("clustercontrast", "ClusterContrastLoss")],
)
def test_the_jigsaw_head_without_identities(
    train_tiny: Callable[..., Path], plugin: str, loss: str
) -> None:
    folder = train_tiny(
        CONFIGS / "usl_synthetic.yaml", plugin, "PLUGINS", f"[tmgf, transreid, {plugin}]",
        "MODEL.BACKBONE.EMBED_DIM", "24", "MODEL.BACKBONE.DEPTH", "2",
        "MODEL.BACKBONE.NUM_HEADS", "3", "MODEL.BACKBONE.STEM_CHANNELS", "8",
        "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "MODEL.HEAD.SHIFT", "2",
        "CRITERION", f"[{{NAME: {loss}}}]",
    )  # fmt: skip
    state, _ = read_checkpoint(folder / "model_final.safetensors")
    assert "head.local.0.attn.qkv.weight" in state
    results = json.loads((folder / "results.json").read_text())
    assert 0 < results["final"][0]["numbers"]["mAP"] <= 1


def test_a_run_with_cameras_and_viewpoints(
    train_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    persons = SyntheticPersons(num_train=8, num_test=4, num_cameras=3, num_distractors=2, height=48,
                               width=32)  # fmt: skip
    rows = ["path,pid,camid,split,view"]
    for split in ("train", "query", "gallery"):
        rows += [f"{Path(record.path).relative_to(tmp_path)},{record.pid},{record.camid},{split},"
                 f"{number % 2}"
                 for number, record in enumerate(persons.load(split))]  # type: ignore[arg-type]  # fmt: skip
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    pairs = (*TINY, *SUPERVISED, "SOLVER.MAX_EPOCHS", "1", "MODEL.BACKBONE.NUM_VIEWS", "2")
    given = ("DATASETS.TRAIN", "{NAME: CSV, PATH: list.csv}")
    folder = _train(train_tiny, "views", *pairs, *given)
    state, _ = read_checkpoint(folder / "model_final.safetensors")
    assert state["backbone.camera_embed"].shape == (3, 2, 24)
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.safetensors"))
    config = load_config(folder / "config.yaml", weights)
    assert build_trained_model(config, (48, 32)).num_cameras == 3
    (numbers,) = run_test(config).values()
    final = json.loads((folder / "results.json").read_text())["final"][0]["numbers"]
    assert numbers == pytest.approx(final)
    with pytest.raises(DataError, match="NUM_VIEWS 1; got 1"):
        _train(train_tiny, "few", *pairs, *given, "MODEL.BACKBONE.NUM_VIEWS", "1")
    (tmp_path / "list.csv").write_text("\n".join(r.rpartition(",")[0] for r in rows) + "\n")
    with pytest.raises(DataError, match="NUM_VIEWS 2; got None"):
        _train(train_tiny, "none", *pairs, *given)


def _train(train_tiny: Callable[..., Path], name: str, *pairs: str) -> Path:
    return train_tiny(CONFIGS / "market.yaml", name, *pairs)
