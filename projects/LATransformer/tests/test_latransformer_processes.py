"""LA-Transformer with two processes: thawing blocks and classifiers of parts as with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = Path(__file__).parents[1] / "configs" / "synthetic.yaml"
PAIRS = (
    "DATASETS.TRAIN",
    "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
    "HEIGHT: 48, WIDTH: 32}",
    "MODEL.BACKBONE.EMBED_DIM", "24", "MODEL.BACKBONE.DEPTH", "2", "MODEL.BACKBONE.NUM_HEADS", "3",
    "MODEL.BACKBONE.STEM_CHANNELS", "8", "MODEL.HEAD.NUM_PARTS", "3", "MODEL.BACKBONE_WEIGHTS", "",
    "SOLVER.FROZEN", "{backbone.net.blocks.0: 1}", "SOLVER.MILESTONES", "[1]",
    "CRITERION", "[{NAME: BottleneckCrossEntropy, WIDTH: 8, DROPOUT: 0}]",
    "DATALOADER.SAMPLER.BATCH_SIZE", "16",
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
