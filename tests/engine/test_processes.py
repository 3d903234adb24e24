"""Several processes give the results of one. Whole runs under torchrun are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from reid.engine.optimization import Optimization
from reid.engine.trainer import Trainer
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.heads import BNNeckHead
from reid.modeling.losses import Criterion, Triplet
from reid.modeling.weights import read_checkpoint
from reid.solver import LearningRate
from reid.structures import Batch, Embeddings, FeatureTokens, PseudoLabels

ROOT = Path(__file__).parents[2]
CONFIG = """
DATASETS:
  TRAIN: {NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 5, NUM_CAMERAS: 3, NUM_DISTRACTORS: 3,
          HEIGHT: 32, WIDTH: 16}
INPUT: {SIZE: [64, 32], TRANSFORMS: [RandomFlip, {NAME: PadCrop, PAD: 2}, RandomErasing]}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {NAME: ProxyBalancedSampler, BATCH_SIZE: 24, IMAGES_PER_PROXY: 4, STEPS_PER_EPOCH: 3}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CRITERION:
  - {NAME: O2CAPLoss, NUM_POSITIVES: 2}
  - {NAME: Triplet, MARGIN: 0.3}
CLUSTERER: {NAME: CameraProxyClusterer, K1: 6, K2: 2, EPS: 0.8, MIN_SAMPLES: 2}
# The rate is small: with 1e-2, rounding in the first step grows to 1e-1 within five more steps.
SOLVER: {BASE_LR: 5.0e-5, MAX_EPOCHS: 2, WARMUP_EPOCHS: 0, MILESTONES: []}
TEST: {EVAL_PERIOD: 1, BATCH_SIZE: 16}
DEVICE: cpu
LOG_PERIOD: 1
"""


def run(
    folder: Path, processes: int, *pairs: str, name: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the real command in its own folder."""
    (folder / "config.yaml").write_text(CONFIG)
    command = ["tools/train_net.py", "--config-file", str(folder / "config.yaml")]
    command += ["OUTPUT_DIR", str(folder / (name or str(processes))), *pairs]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [*launcher, str(processes), *command]
    environment = os.environ | {
        "REID_DATASETS": str(folder / "datasets"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=400,
    )  # fmt: skip


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.json without times and memory."""
    changing = ("data_time", "step_time", "memory_mb", "extraction_time", "label_time")
    lines = (folder / "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in changing} for line in lines]


def assert_same(found: Path, expected: Path) -> None:
    """All numbers of two runs agree to 1e-5, everything else exactly."""
    lines, others = numbers(expected), numbers(found)
    assert [line["kind"] for line in others] == [line["kind"] for line in lines]
    assert {"labels", "train", "test"} <= {line["kind"] for line in lines}
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            if isinstance(value, str):
                assert other[key] == value
            else:
                assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (key, line)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    done = run(folder, 1)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_train_as_one(alone: Path, processes: int) -> None:
    # extraction, labels, sampling, augmentation, losses, BatchNorm, weights and metrics
    done = run(alone, processes)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    assert_same(alone / str(processes), alone / "1")
    before, _ = read_checkpoint(alone / "1" / "model_final.safetensors")
    after, _ = read_checkpoint(alone / str(processes) / "model_final.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.slow
def test_one_process_with_groups_trains_as_replicas(alone: Path) -> None:
    # A batch of 24 has two groups of 12: the shares of two processes, or the halves of one batch.
    groups = ("MODEL.BN_SAMPLES_PER_GROUP", "12")
    for processes in (1, 2):
        done = run(alone, processes, *groups, name=f"groups{processes}")
        assert done.returncode == 0, done.stderr
    assert_same(alone / "groups2", alone / "groups1")
    plain = [line["loss"] for line in numbers(alone / "1") if line["kind"] == "train"]
    grouped = [line["loss"] for line in numbers(alone / "groups1") if line["kind"] == "train"]
    assert grouped != pytest.approx(plain, rel=1e-5)


class Small(nn.Module):
    """Tests with the feature before the neck, so the triplet loss alone leaves the neck unused."""

    embed_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, self.embed_dim)
        self.head = BNNeckHead(self, "before")

    def forward(self, batch: Batch) -> Embeddings:
        tokens = self.layer(batch.image.flatten(1))[:, None]
        return self.head(FeatureTokens(tokens, (0, 0)), batch)


def stepped(rank: int, world_size: int) -> dict[str, Tensor]:
    """A small model's state after three steps with a share of a batch of 16."""
    torch.manual_seed(0)
    model = Small()
    group_batch_norms(model, 0)
    criterion = Criterion([Triplet()])
    index = torch.arange(16)
    criterion.set_labels(PseudoLabels.from_clusters(index % 4), None)
    share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
    batch = Batch.of(torch.randn(16, 3, 2, 2), index=index).map(lambda column: column[share])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    cpu, loader = torch.device("cpu"), cast(Any, [batch])
    optimization = Optimization(optimizer, LearningRate(0.1, 1), cpu, clip_grad_norm=1.0)
    trainer = Trainer(model, criterion, optimization, loader, max_epochs=1, device=cpu)
    for _ in range(3):
        trainer.run_step(batch)
    return model.state_dict()


def test_several_processes_do_not_change_parameters_without_a_loss(
    in_two_processes: Callable[..., list[Any]],
) -> None:
    expected = stepped(0, 1)
    assert bool((expected["head.neck.weight"] == 1).all())  # no weight decay either
    for found in in_two_processes(stepped):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


BREAK = """
from reid import distributed
from reid.registry import HOOK, Hook


@HOOK.register()
class Break(Hook):
    def after_step(self, trainer):
        if distributed.rank() == 1 and trainer.step == 2:
            raise OSError("the disk of this machine is gone")
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(alone: Path) -> None:
    (alone / "break_one.py").write_text(BREAK)
    done = run(alone, 2, "PLUGINS", "[break_one]", "HOOKS", "[Break]", name="broken")
    assert done.returncode != 0
    assert "the disk of this machine is gone" in done.stderr


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share_equally(alone: Path) -> None:
    sampler = "{NAME: ProxyBalancedSampler, BATCH_SIZE: 9, IMAGES_PER_PROXY: 3}"
    done = run(alone, 2, "DATALOADER.SAMPLER", sampler, name="uneven")
    assert done.returncode != 0
    assert "batch_size: expected a multiple of the 2 processes, got 9" in done.stderr
