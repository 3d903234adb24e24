"""The learning rate and the log lines of training; whole runs test the other hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reid.engine.hooks.log_metrics import LogMetrics
from reid.engine.optimization import Optimization
from reid.engine.trainer import Trainer
from reid.modeling.losses import Criterion
from reid.modeling.losses import Loss as BaseLoss
from reid.registry import Hook
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings


class Loader(list[Batch]):
    """Epochs of the given lengths, in turn."""

    def __init__(self, *lengths: int) -> None:
        super().__init__([Batch.of(torch.randn(4, 3, 2, 2))])
        self.lengths = lengths
        self.epoch = 0

    @property
    def batch_sampler(self) -> Loader:
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.lengths[self.epoch % len(self.lengths)]

    def __iter__(self) -> Any:
        return (self[0] for _ in range(len(self)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 2)

    def forward(self, batch: Batch) -> Embeddings:
        feature = self.layer(batch.image.flatten(1))
        return Embeddings(feature[:, None], feature[:, None], feature[:, None], feature)


class Loss(BaseLoss):
    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        return {"square": embeddings.test.square().mean()}


class Rates(Hook):
    """Records the rates of each iteration, and the state after each epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self.states: list[dict[str, Any]] = []

    def after_step(self, trainer: Trainer) -> None:
        self.seen.append([group["lr"] for group in trainer.optimization.optimizer.param_groups])

    def save(self, trainer: Trainer) -> None:
        self.states.append(copy.deepcopy(trainer.state_dict()))


def trainer(hooks: list[Hook], loader: Loader, max_epochs: int, **rate: Any) -> Trainer:
    net = Net()
    optimizer = build_optimizer(net.named_parameters(), "SGD", lr=1.0, bias_lr_factor=2.0)
    cpu = torch.device("cpu")
    rates = LearningRate(1.0, max_epochs, milestones=(2,), **rate)
    optimization = Optimization(optimizer, rates, cpu)
    given: Any = loader
    return Trainer(
        net, Criterion([Loss()]), optimization, given, max_epochs=max_epochs, device=cpu,
        hooks=hooks,
    )  # fmt: skip


def test_warm_up_by_iterations() -> None:
    rates, warmup = Rates(), {"warmup_iterations": 5, "warmup_start": 0.1}
    trainer([rates], Loader(3), 3, **warmup).train()
    weights, biases = zip(*rates.seen, strict=True)
    assert weights == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1, 0.1, 0.1, 0.1])
    # all groups start from the same rate
    assert biases == pytest.approx([0.1, 0.48, 0.86, 1.24, 1.62, 2, 0.2, 0.2, 0.2])
    for epoch, state in enumerate(rates.states[:2], 1):
        again = Rates()
        resumed = trainer([again], Loader(3), 3, **warmup)
        resumed.load_state_dict(state)
        resumed.train()
        assert again.seen == rates.seen[3 * epoch :]


def test_epochs_of_different_lengths_are_logged_each_to_its_end() -> None:
    class Writer:
        def __init__(self) -> None:
            self.steps: list[tuple[int, int]] = []

        def write(self, kind: str, step: int, epoch: int, numbers: dict[str, float]) -> None:
            self.steps.append((epoch, step))

    writer: Any = Writer()
    trainer([LogMetrics(writer, 2)], Loader(3, 4, 1), 3).train()
    assert writer.steps == [(0, 2), (0, 3), (1, 5), (1, 7), (2, 8)]
