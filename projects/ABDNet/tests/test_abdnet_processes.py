"""ABD-Net with two processes: groups of BatchNorm, frozen layers and penalties as with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAIRS = (
    "DATASETS.TRAIN",
    "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
    "HEIGHT: 48, WIDTH: 32}",
    "MODEL.BACKBONE.MODEL", "test_resnet", "MODEL.BACKBONE_WEIGHTS", "''", "MODEL.HEAD.DIM", "16",
    "MODEL.HEAD.DROPOUT", "0.0", "MODEL.HEAD.CHANNEL_DROPOUT", "0.0", "INPUT.SIZE", "[64, 32]",
    "MODEL.BN_SAMPLES_PER_GROUP", "8", "DATALOADER.NUM_WORKERS", "0",
    "DATALOADER.SAMPLER.BATCH_SIZE", "16", "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2",
    "STAGES.0.EPOCHS", "1", "STAGES.1.EPOCHS", "2", "SOLVER.MILESTONES", "[]",
    "CRITERION.2.START_EPOCH", "1", "CRITERION.3.WEIGHTS",
    "['backbone.net.conv1.0.weight']", "DEVICE", "cpu", "LOG_PERIOD", "1", "TEST.EVAL_PERIOD", "0",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one(
    steps_in_processes: Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]],
) -> None:
    config = Path(__file__).parents[1] / "configs" / "market.yaml"
    one, other = steps_in_processes(config, *PAIRS)
    assert len(one) == len(other) == 6
    keys = {key for line in one for key in line if key.endswith("orthogonality")}
    assert keys == {"feature_orthogonality", "weight_orthogonality"}
    for line, twin in zip(one, other, strict=True):
        assert line.keys() == twin.keys()
        for key in {"loss", "cross_entropy", "triplet", *keys} & line.keys():
            assert twin[key] == pytest.approx(line[key], rel=1e-3, abs=1e-7), key
