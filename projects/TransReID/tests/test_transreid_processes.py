"""TransReID with two processes: necks, shuffled patches and vectors of cameras as with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = Path(__file__).parents[1] / "configs" / "market.yaml"
PAIRS = (
    "DATASETS.TRAIN",
    "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
    "HEIGHT: 48, WIDTH: 32}",
    "MODEL.BACKBONE.EMBED_DIM", "24", "MODEL.BACKBONE.DEPTH", "2", "MODEL.BACKBONE.NUM_HEADS", "3",
    "MODEL.BACKBONE.PATCH_SIZE", "8", "MODEL.BACKBONE.PATCH_STRIDE", "6",
    "MODEL.BACKBONE.DROP_PATH", "0", "MODEL.BACKBONE_WEIGHTS", "",
    "DATALOADER.SAMPLER", "{NAME: PKSampler, BATCH_SIZE: 16, IMAGES_PER_IDENTITY: 4, "
    "STEPS_PER_EPOCH: 2}", "SOLVER.WARMUP_EPOCHS", "0", "SOLVER.COSINE_AFTER_WARMUP", "true",
    "INPUT.SIZE", "[48, 32]", "DATALOADER.NUM_WORKERS", "0", "SOLVER.AMP", "off",
    "SOLVER.MAX_EPOCHS", "2", "DEVICE", "cpu", "LOG_PERIOD", "1", "TEST.EVAL_PERIOD", "0",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one(
    steps_in_processes: Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]],
) -> None:
    one, other = steps_in_processes(CONFIG, *PAIRS)
    for line, twin in zip(one, other, strict=True):
        for key in ("loss", "part_cross_entropy", "part_triplet"):
            assert twin[key] == pytest.approx(line[key], rel=1e-4, abs=1e-5), key
