"""PCL-CLIP with two processes: two necks, frozen patches and the memory as with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAIRS = (
    "DATASETS.TRAIN",
    "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
    "HEIGHT: 48, WIDTH: 32}",
    "MODEL.BACKBONE", "{NAME: CLIPViT, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 2, PROJECTION: 16}",
    "INPUT.SIZE", "[48, 32]", "DATALOADER.NUM_WORKERS", "0",
    "DATALOADER.SAMPLER.BATCH_SIZE", "16", "DATALOADER.SAMPLER.IMAGES_PER_IDENTITY", "4",
    "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "SOLVER.AMP", "off", "SOLVER.MAX_EPOCHS", "2",
    "SOLVER.MILESTONES", "[]", "DEVICE", "cpu", "LOG_PERIOD", "1", "TEST.EVAL_PERIOD", "0",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one(
    steps_in_processes: Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]],
) -> None:
    config = Path(__file__).parents[1] / "configs" / "supervised_market.yaml"
    one, other = steps_in_processes(config, *PAIRS)
    for line, twin in zip(one, other, strict=True):
        for key in ("loss", "global_contrast", "cross_entropy"):
            assert twin[key] == pytest.approx(line[key], rel=1e-4, abs=1e-5), key
