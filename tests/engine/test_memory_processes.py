"""Losses whose memories last over epochs: two processes train like one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.engine.optimization import Optimization
from reid.engine.trainer import Trainer
from reid.modeling.losses import Criterion
from reid.modeling.memory_losses import MemoryLoss
from reid.projects.clusterensemble import EnsembleLoss
from reid.projects.rlcc import RLCCLoss
from reid.projects.spcl import SpCLLoss
from reid.solver import LearningRate
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CPU = torch.device("cpu")
LOSSES: tuple[type[MemoryLoss], ...] = (SpCLLoss, RLCCLoss, EnsembleLoss)


class Linear(nn.Module):
    """A sample's embedding does not depend on its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)

    def forward(self, batch: Batch) -> Embeddings:
        raw = self.layer(batch.image.flatten(1))[:, None]
        unit = F.normalize(raw, dim=2)
        return Embeddings(raw, raw, unit, unit[:, 0])


def trained(kind: type[MemoryLoss], rank: int, world_size: int) -> dict[str, Tensor]:
    """Weights, memory and losses after three epochs of two steps with a share of each batch."""
    torch.manual_seed(0)
    model, loss, image = Linear(), kind(temperature=0.05, momentum=0.2), torch.randn(48, 3, 2, 2)  # type: ignore[call-arg]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimization = Optimization(optimizer, LearningRate(0.1, 1), CPU)
    trainer = Trainer(
        model, Criterion([loss]), optimization, cast(Any, []), max_epochs=1, device=CPU
    )
    result = {}
    for epoch in range(3):
        with torch.no_grad():
            unit = model(Batch.of(image)).unit
        labels = PseudoLabels.from_clusters((torch.arange(48) // 3).roll(epoch))
        labels = replace(labels, side={"finer": torch.arange(48) // 2})
        loss.set_labels(labels, FeatureSet.of(unit[:, 0]))
        for step in range(2):
            rows = torch.randperm(48, generator=torch.Generator().manual_seed(step))[:16]
            batch = Batch.of(image[rows], index=rows)
            share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
            trainer.run_step(batch.map(lambda column, share=share: column[share]))  # type: ignore[misc]
        result |= {f"{epoch} {name}": value for name, value in trainer.losses.items()}
    return result | {"rows": loss.memory.rows, "weight": model.layer.weight.detach()}


def process(rank: int, world_size: int) -> Any:
    return [trained(kind, rank, world_size) for kind in LOSSES]


def test_two_processes_train_like_one(in_two_processes: Callable[..., list[Any]]) -> None:
    shares = in_two_processes(process)
    for number, kind in enumerate(LOSSES):
        one, other = shares[0][number], shares[1][number]
        assert torch.equal(one["rows"], other["rows"])
        for name, expected in trained(kind, 0, 1).items():
            what = f"{kind.__name__} {name}"
            torch.testing.assert_close(one[name], expected, atol=1e-5, rtol=1e-5, msg=what)
            torch.testing.assert_close(other[name], expected, atol=1e-5, rtol=1e-5, msg=what)
