"""PFD's published settings, and small runs on drawn persons."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reid.assembly.images import build_train_loader
from reid.config import load_config
from reid.data.samplers import PKSampler
from reid.modeling.weights import read_checkpoint
from reid.registry import ConfigError
from reid.structures import DataError
from reid.workflows.evaluate import evaluate as run_test
from reid.workflows.predict import Predictor

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = (
    "INPUT.MAPS", "[{NAME: DrawnHeatmaps}]", "MODEL.BACKBONE.EMBED_DIM", "24",
    "MODEL.BACKBONE.DEPTH", "2", "MODEL.BACKBONE.NUM_HEADS", "3", "MODEL.BACKBONE.PATCH_SIZE", "8",
    "MODEL.BACKBONE.PATCH_STRIDE", "8", "MODEL.HEAD.DECODER_LAYERS", "1",
    "MODEL.HEAD.DECODER_HEADS", "4", "MODEL.HEAD.DECODER_WIDTH", "24", "SOLVER.AMP", "off",
    "SOLVER.WARMUP_EPOCHS", "1", "CLUSTERER", "null",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stride", "hidden_below", "layers"),
    [
        ("market", 16, 0.2, 6), ("duke", 12, 0.3, 6), ("duke_16", 16, 0.3, 6), ("msmt", 16, 0.3, 6),
        ("occluded_duke", 16, 0.3, 2),
    ],
)  # fmt: skip
def test_published_settings(name: str, stride: int, hidden_below: float, layers: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.input.size == (256, 128)
    assert config.input.pixel_mean == config.input.pixel_std == (0.5, 0.5, 0.5)
    assert (config.input.interpolation, config.input.test_interpolation) == ("bicubic", "bilinear")
    assert config.input.maps == [{"name": "PoseHeatmaps", "folder": "heatmaps"}]
    assert config.model.backbone == {
        "name": "ViT", "stem": "patches", "patch_size": 16, "patch_stride": stride,
        "embed_dim": 768, "depth": 12, "num_heads": 12, "drop_path": 0.1,
        "camera_embedding": True, "camera_scale": 3.0,
    }  # fmt: skip
    assert config.model.head == {
        "name": "PFDHead", "hidden_below": hidden_below, "decoder_layers": layers,
        "decoder_heads": 8, "decoder_width": 2048, "dropout": 0.1,
    }  # fmt: skip
    assert config.criterion == [{"name": "PFDLoss", "smoothing": 0.1, "init_std": 0.001,
                                 "margin": None, "hidden": "together"}]  # fmt: skip
    solver = config.solver
    assert [solver.optimizer, solver.base_lr, solver.bias_lr_factor, solver.momentum,
            solver.weight_decay, solver.max_epochs, solver.schedule, solver.final_lr_factor,
            solver.cosine_after_warmup, solver.schedule_offset, solver.warmup_epochs,
            solver.warmup_factor, solver.amp, config.seed] == [
        "SGD", 8e-3, 2, 0.9, 1e-4, 300, "cosine", 0.002, False, 1, 5, 0.01, "fp16", 1234
    ]  # fmt: skip
    assert config.dataloader.sampler == {"name": "RandomIdentitySampler", "batch_size": 64,
                                         "images_per_identity": 4, "epoch": "round"}  # fmt: skip
    flip, crop, erasing = config.input.transforms
    assert (flip, crop) == ({"name": "RandomFlip", "prob": 0.5}, {"name": "PadCrop", "pad": 10})
    assert (erasing["name"], erasing["prob"], erasing["fill"]) == ("RandomErasing", 0.5, "noise")
    assert erasing["area"] == pytest.approx([0.02, 1 / 3])
    assert erasing["aspect"] == pytest.approx([0.3, 1 / 0.3])
    assert config.model.bn_samples_per_group == 0
    assert (config.test.flip, config.test.evaluator) == (False, {"name": "Market1501Evaluator"})


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def test_a_small_run_its_test_and_single_pictures(train_tiny: Callable[..., Path]) -> None:
    folder = train_tiny(CONFIGS / "market.yaml", "whole", *TINY)
    for name in ("pfd_parts", "pfd_slots", "pfd_hidden"):
        assert all(math.isfinite(line[name]) for line in steps_of(folder))
    final = json.loads((folder / "results.json").read_text())["final"][0]["numbers"]
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.safetensors"))
    (numbers,) = run_test(load_config(folder / "config.yaml", weights)).values()
    assert numbers == pytest.approx(final)
    mirrored = load_config(folder / "config.yaml", [*weights, "TEST.FLIP", "true"])
    (flipped,) = run_test(mirrored).values()
    assert 0 < flipped["mAP"] <= 1
    with pytest.raises(ConfigError, match=r"no heatmaps.*any other picture.*POSE"):
        Predictor(folder)


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    pairs = (*TINY, "SOLVER.SCHEDULE", "multistep", "SOLVER.MILESTONES", "[1]")
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "1")
    two = train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, other = (read_checkpoint(f / "model_final.safetensors")[0] for f in (whole, two))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_without_heatmaps_names_an_image(train_tiny: Callable[..., Path]) -> None:
    pairs = (*TINY, "INPUT.MAPS", "[{NAME: PoseHeatmaps}]")
    with pytest.raises(DataError, match=r"\.jpg: has no heatmaps.*README"):
        train_tiny(CONFIGS / "market.yaml", "files", *pairs)
    with pytest.raises(ConfigError, match=r"no heatmaps.*INPUT\.MAPS"):
        train_tiny(CONFIGS / "market.yaml", "none", *TINY, "INPUT.MAPS", "[]")
    with pytest.raises(ConfigError, match=r"input\.maps\[0\]\.folders: PoseHeatmaps has no such"):
        train_tiny(
            CONFIGS / "market.yaml", "wrong", *TINY,
            "INPUT.MAPS", "[{NAME: PoseHeatmaps, FOLDERS: x}]",
        )  # fmt: skip


def test_maps_of_the_same_name(train_tiny: Callable[..., Path]) -> None:
    """The second one would silently take the place of the first one."""
    maps = "[{NAME: DrawnHeatmaps}, {NAME: DrawnHeatmaps, STRIDE: 8}]"
    said = r"input\.maps: .* different names, got DrawnHeatmaps is heatmap, D"
    with pytest.raises(ConfigError, match=said):
        train_tiny(CONFIGS / "market.yaml", "two", *TINY, "INPUT.MAPS", maps)
    with pytest.raises(ConfigError, match=r"got \(16, 17, 6, 4\); .* or the STRIDE of INPUT\.MAPS"):
        train_tiny(
            CONFIGS / "market.yaml", "coarse", *TINY,
            "INPUT.MAPS", "[{NAME: DrawnHeatmaps, STRIDE: 8}]",
        )  # fmt: skip


def test_images_that_are_all_alike_and_persons_alone(
    train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one person, who has no negatives, and of the same picture again and again."""
    sampler = "{NAME: RandomIdentitySampler, BATCH_SIZE: 4, IMAGES_PER_IDENTITY: 4}"
    small = (*TINY, "DATALOADER.SAMPLER", sampler, "SOLVER.MAX_EPOCHS", "1", "LOG_PERIOD", "1")
    grey = np.full((48, 32, 3), 99, np.uint8)
    monkeypatch.setattr("reid.data.transforms.read_image", lambda *_: grey)
    plain = ("INPUT.TRANSFORMS", "[]", "INPUT.MAPS", "[{NAME: DrawnHeatmaps}]")
    steps = steps_of(train_tiny(CONFIGS / "market.yaml", "alike", *small, *plain))
    assert steps
    assert all(math.isfinite(line["loss"]) for line in steps)


def test_several_views_have_no_maps() -> None:
    config = load_config(CONFIGS / "synthetic.yaml")
    with pytest.raises(ConfigError, match=r"input\.maps: are read for one view.* needs 2 views"):
        build_train_loader(config, [], PKSampler(4), torch.device("cpu"), 2, None)


@pytest.mark.slow
def test_two_processes_train_as_one(
    steps_in_processes: Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]],
) -> None:
    persons = (
        "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
        "HEIGHT: 48, WIDTH: 32}"
    )
    lines, twins = steps_in_processes(
        CONFIGS / "market.yaml", *TINY, "DATASETS.TRAIN", persons, "INPUT.SIZE", "[48, 32]",
        "DATALOADER.NUM_WORKERS", "0", "DATALOADER.SAMPLER.BATCH_SIZE", "16",
        "MODEL.BACKBONE_WEIGHTS", "''", "SOLVER.MAX_EPOCHS", "2", "DEVICE", "cpu",
        "LOG_PERIOD", "1", "TEST.EVAL_PERIOD", "0",
        # Each process draws its own dropped layers and numbers.
        "MODEL.BACKBONE.DROP_PATH", "0.0", "MODEL.HEAD.DROPOUT", "0.0",
    )  # fmt: skip
    # Later, rounding makes a part take another view, which is a jump.
    for line, twin in zip(lines[:2], twins[:2], strict=True):
        for name in ("pfd_parts", "pfd_slots", "pfd_hidden"):
            assert twin[name] == pytest.approx(line[name], rel=1e-3, abs=1e-4), name
