from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes

from reid.checking import ConfigError
from reid.engine.optimization import Optimization
from reid.engine.stopping import (
    Interrupted,
    StopSignals,
    TimeIsUp,
    deadline_after,
    resume_command,
    same_command,
)
from reid.engine.trainer import Trainer
from reid.modeling.losses import Criterion, Loss
from reid.registry import Hook
from reid.solver import LearningRate
from reid.structures import Batch, Embeddings

ROOT = Path(__file__).parents[2]


def test_a_signal_raises_at_once_or_after_a_delayed_block() -> None:
    done = []

    def work(signals: StopSignals) -> None:
        with signals.delayed():
            with signals.delayed():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("never")

    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        with pytest.raises(Interrupted, match="SIGINT has ended the run") as info:
            work(signals)
        assert done == ["inner", "outer"]
        assert info.value.exit_code == 130
        with pytest.raises(Interrupted):
            signals.check()
        os.kill(os.getpid(), signal.SIGINT)  # within a second: counts as the launcher's copy
    assert signal.getsignal(signal.SIGINT) is before
    with StopSignals() as signals, pytest.raises(Interrupted) as info:
        os.kill(os.getpid(), signal.SIGTERM)
    assert info.value.exit_code == 143


SECOND = """
import time
from reid.engine.optimization import Optimization
from reid.engine.stopping import StopSignals
with StopSignals() as signals, signals.delayed():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        if signals.came():
            print("came", flush=True)
            while True:
                time.sleep(0.05)
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SECOND], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGTERM)
            assert child.stdout.readline() == "came\n"
            time.sleep(1.1)
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=30) == -signal.SIGTERM
        finally:
            child.kill()


def test_the_command_that_resumes_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    arguments = ["tools/train_net.py", "--overwrite", "--config-file", "a b.yaml", "SEED", "2"]
    command = resume_command(arguments)
    expected = "tools/train_net.py --resume --config-file 'a b.yaml' SEED 2"
    assert command == f"{Path(sys.executable).name} {expected}"
    assert resume_command([*command.split()[1:2], "--resume"]).count("--resume") == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resume_command(arguments) == f"torchrun --nproc-per-node 2 --nnodes 2 {expected}"
    installed = ["reid train", "--config-file", "tmgf/demo.yaml"]
    expected = "--resume --config-file tmgf/demo.yaml"
    several = f"torchrun --nproc-per-node 2 --nnodes 2 -m reid train {expected}"
    assert resume_command(installed) == several
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert resume_command(installed) == f"reid train {expected}"
    assert same_command(["reid reproduce", "--rows", "a b"]) == "reid reproduce --rows 'a b'"


def test_a_deadline() -> None:
    signals = StopSignals()
    signals.check_time()
    signals.deadline = deadline_after(1)
    assert signals.deadline - time.monotonic() == pytest.approx(3600, abs=60)
    signals.check_time()
    signals.deadline = time.monotonic()
    with pytest.raises(TimeIsUp):
        signals.check_time()


@pytest.mark.parametrize("hours", [0, -1, float("nan")])
def test_a_time_limit_is_positive(hours: float) -> None:
    with pytest.raises(ConfigError, match="hours: expected more than 0, got "):
        deadline_after(hours)


class Batches(list[Batch]):
    @property
    def batch_sampler(self) -> Any:
        return SimpleNamespace(set_epoch=lambda epoch: None)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, batch: Batch) -> Embeddings:
        self.seen = batch.image.mean()
        feature = self.layer(batch.image.nan_to_num())
        return Embeddings(feature[:, None], feature[:, None], feature[:, None], feature)


class LooksAtImages(Loss):
    """A loss of the images of this process only; counts the steps that the optimizer took."""

    steps: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._models = [model]  # in a list, so that it is no submodule
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        loss = 1e-3 * embeddings.test.float().square().mean()
        return {"loss_of_test": loss + 0 * self._models[0].seen}

    def commit(  # type: ignore[override]
        self, embeddings: Embeddings, batch: Batch, *, taken: Tensor | None = None
    ) -> None:
        self.steps += 1 if taken is None else taken


class SignalTo(Hook):
    """Sends SIGTERM to one process after the third step; the others learn of it one step later."""

    def after_step(self, trainer: Trainer) -> None:
        if dist.get_rank() == 1 and trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def process(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    for odd_rank, value in ((0, torch.nan), (1, 1e4), (-1, 1.0)):
        train(rank, world_size, folder, odd_rank, value)


def train(rank: int, world_size: int, folder: str, odd_rank: int, value: float) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{odd_rank}", rank=rank, world_size=world_size
    )
    model = Model()
    loss = LooksAtImages(model)
    batches = Batches(Batch.of(torch.ones(2, 4)) for _ in range(8))
    if rank == odd_rank:
        batches[1] = Batch.of(torch.full((2, 4), value))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StopSignals() as signals:
        trainer = Trainer(
            model,
            Criterion([loss]),
            Optimization(optimizer, LearningRate(0.1, 1), torch.device("cpu"), amp="fp16"),
            batches,  # type: ignore[arg-type]
            max_epochs=1,
            device=torch.device("cpu"),
            hooks=[SignalTo()],
            signals=signals,
        )
        try:
            trainer.train()
            end = "finished"
        except (Interrupted, FloatingPointError) as error:
            end = str(error)
    text = f"{trainer.step} {int(loss.steps)} {end}"
    (Path(folder) / f"{odd_rank}_{rank}.txt").write_text(text)
    dist.destroy_process_group()


def test_all_processes_react_to_what_happens_in_one(tmp_path: Path) -> None:
    """A signal or a loss that is not finite ends all; after an overflow, none takes a step."""
    start_processes(process, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    broken = [(tmp_path / f"0_{rank}.txt").read_text() for rank in range(2)]
    assert broken[0].startswith("1 1 step 2, epoch 1: the loss is not finite (loss nan")
    assert broken[1].startswith("1 1 step 2, epoch 1: the loss is not finite (on another process)")
    overflown = [(tmp_path / f"1_{rank}.txt").read_text() for rank in range(2)]
    assert overflown == ["4 3 SIGTERM has ended the run"] * 2
    stopped = [(tmp_path / f"-1_{rank}.txt").read_text() for rank in range(2)]
    assert stopped == ["4 4 SIGTERM has ended the run"] * 2
