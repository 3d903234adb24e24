"""PCB, the network of st-ReID, with two processes: stripes and their classifiers as with one."""

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
    "MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1, MIRROR: true}",
    "MODEL.BACKBONE_WEIGHTS", "", "MODEL.HEAD.NUM_STRIPES", "2", "MODEL.HEAD.DROPOUT", "0",
    "DATALOADER.SAMPLER", "{NAME: ImageSampler, BATCH_SIZE: 16}", "SOLVER.MILESTONES", "[]",
    "CRITERION.0.WIDTH", "8", "CRITERION.0.DROPOUT", "0", "TEST.EVALUATOR", "Market1501Evaluator",
    "INPUT.SIZE", "[48, 32]", "DATALOADER.NUM_WORKERS", "0", "SOLVER.AMP", "off",
    "SOLVER.MAX_EPOCHS", "2", "DEVICE", "cpu", "LOG_PERIOD", "1", "TEST.EVAL_PERIOD", "0",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one(
    steps_in_processes: Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]],
) -> None:
    one, other = steps_in_processes(CONFIG, *PAIRS)
    for line, twin in zip(one, other, strict=True):
        for key in ("loss",):
            assert twin[key] == pytest.approx(line[key], rel=1e-4, abs=1e-5), key
