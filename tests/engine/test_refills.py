"""Classifiers over clusters in the trainer: rows that come and go, checkpoints, processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from reid.engine.optimization import Optimization
from reid.engine.trainer import Trainer
from reid.modeling.classifiers import ClusterClassifier, Moments
from reid.modeling.heads import BNNeckHead
from reid.modeling.losses import Criterion, Loss, smoothed_cross_entropy
from reid.registry import Hook
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings, FeatureSet, FeatureTokens, PseudoLabels

CPU = torch.device("cpu")
CLUSTERS = (4, 6, 3, 5)  # of each epoch
IMAGES = 24


class Small(nn.Module):
    embed_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, self.embed_dim)
        self.head = BNNeckHead(self)

    def forward(self, batch: Batch) -> Embeddings:
        tokens = self.layer(batch.image.flatten(1))[:, None]
        found: Embeddings = self.head.eval()(FeatureTokens(tokens, (0, 0)), batch)
        return found


class Classify(Loss):
    needs_features = True

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.classifier = ClusterClassifier(8, moments)

    def set_labels(self, labels: PseudoLabels, features: FeatureSet | None) -> None:
        assert features is not None
        super().set_labels(labels, features)
        self.classifier.refill(labels.cluster, labels.num_clusters, features.test)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        logits = self.classifier(embeddings.post[:, 0])
        return {"classify": smoothed_cross_entropy(logits, self.cluster[batch.index])}


class Labels(Hook):
    """Another number of clusters in each epoch."""

    def before_epoch(self, trainer: Trainer) -> None:
        index = torch.arange(IMAGES)
        with torch.no_grad():
            unit = trainer.model(Batch.of(pixels())).test
        labels = PseudoLabels.from_clusters(index % CLUSTERS[trainer.epoch])
        trainer.criterion.set_labels(labels, FeatureSet.of(unit))


def pixels() -> Tensor:
    return torch.randn(IMAGES, 3, 2, 2, generator=torch.Generator().manual_seed(3))


class Loader(list[Batch]):
    """Two batches, of which this process has its share."""

    def __init__(self, rank: int, world_size: int) -> None:
        share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
        index = torch.arange(IMAGES)
        whole = [Batch.of(pixels()[part], index=part) for part in index.split(12)]
        super().__init__(batch.map(lambda column: column[share]) for batch in whole)

    @property
    def batch_sampler(self) -> Any:
        return self

    def set_epoch(self, epoch: int) -> None: ...


def trainer_of(
    moments: Moments, optimizer: str = "Adam", epochs: int = 4, rank: int = 0, world_size: int = 1
) -> Trainer:
    torch.manual_seed(0)
    model, criterion = Small(), Criterion([Classify(moments)])
    parameters = [*model.parameters(), *criterion.parameters()]
    built = build_optimizer(parameters, cast(Any, optimizer), lr=0.01, weight_decay=0.1)
    optimization = Optimization(built, LearningRate(0.01, epochs), CPU, clip_grad_norm=1.0)
    loader = cast(Any, Loader(rank, world_size))
    return Trainer(
        model, criterion, optimization, loader, max_epochs=epochs, device=CPU, hooks=[Labels()]
    )


def numbers(trainer: Trainer) -> dict[str, Tensor]:
    """All weights, and the optimizer's state."""
    found = {**trainer.model.state_dict(), **trainer.criterion.state_dict()}
    for number, state in trainer.optimization.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value for name, value in state.items()}
    return found


@pytest.mark.parametrize("moments", ["keep", "drop"])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_a_resumed_run_is_the_uninterrupted_one(moments: Moments, optimizer: str) -> None:
    whole = trainer_of(moments, optimizer)
    whole.train()
    assert whole.criterion.state_dict()["losses.0.classifier.weight"].shape == (5, 8)
    for epochs in (1, 2, 3):
        stopped = trainer_of(moments, optimizer, epochs)
        stopped.train()
        saved = copy.deepcopy(stopped.state_dict())
        resumed = trainer_of(moments, optimizer)
        resumed.load_state_dict(saved)
        assert torch.equal(
            resumed.criterion.state_dict()["losses.0.classifier.weight"],
            saved["criterion"]["losses.0.classifier.weight"],
        )
        resumed.train()
        found, expected = numbers(resumed), numbers(whole)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_keeping_and_dropping_moments_differ() -> None:
    kept, dropped = trainer_of("keep"), trainer_of("drop")
    kept.train()
    dropped.train()
    name = "losses.0.classifier.weight"
    assert not torch.equal(numbers(kept)[name], numbers(dropped)[name])


def test_checkpoints_that_do_not_fit() -> None:
    trainer = trainer_of("keep", epochs=1)
    trainer.train()
    name = "losses.0.classifier.weight"
    for rows, expected in (
        (torch.zeros(4, 9), r"criterion\.losses\.0\.classifier\.weight: expected .*got .*\(4, 9\)"),
        (torch.full((4, 8), torch.nan), r"classifier\.weight: expected finite values"),
        (
            torch.zeros(5, 8),
            r"state\[3\]\.exp_avg: expected .* \(5, 8\), got .*\(4, 8\)",
        ),
        (None, r"classifier\.weight: expected a tensor, got None"),
    ):
        state = copy.deepcopy(trainer.state_dict())
        state["criterion"][name] = rows
        with pytest.raises(ValueError, match=expected):
            trainer_of("keep").load_state_dict(state)


def process(rank: int, world_size: int) -> Any:
    trainer = trainer_of("keep", rank=rank, world_size=world_size)
    trainer.train()
    return numbers(trainer)


def test_several_processes_train_as_one(in_two_processes: Callable[..., list[Any]]) -> None:
    one = trainer_of("keep")
    one.train()
    expected = numbers(one)
    first, second = in_two_processes(process)
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-5, msg=name)
