from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from reid.engine.nonfinite import BufferCopy, NonFiniteLosses
from reid.engine.optimization import Optimization
from reid.engine.randomness import seed_everything
from reid.engine.trainer import Trainer
from reid.modeling.losses import Criterion, Loss
from reid.registry import Hook
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings

CPU = torch.device("cpu")


class Rows(Dataset):
    """Twelve random images with two-valued labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(12, 3, 4, 4, generator=generator)

    def __getitem__(self, index: int) -> Batch:
        row = torch.tensor(index)
        return Batch(self.images[index], row * 0, row * 0, row, {}, ())


class Batches:
    """Batches of four in an order that depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch))
        yield from order.view(3, 4).tolist()


class Net(nn.Module):
    """A linear layer with dropout, so that the random state matters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 2)

    def logits(self, batch):
        return self.layer(nn.functional.dropout(batch.image.flatten(1), 0.3, self.training))

    def forward(self, batch):
        logits = self.logits(batch)
        return Embeddings(logits[:, None], logits[:, None], logits[:, None], logits)


class Parity(Loss):
    """Whether an image's index is odd."""

    def forward(self, embeddings, batch):
        return {"ce": nn.functional.cross_entropy(embeddings.test.float(), batch.index % 2)}


def make(hooks=(), max_epochs=3, net=None, loss=None, nonfinite=None, warmup=1, **options):
    net = net or Net()
    optimizer = build_optimizer(net.parameters(), "SGD", lr=0.1, weight_decay=1e-3)
    rate = LearningRate(0.1, max_epochs, milestones=(2,), warmup_epochs=warmup)
    loader = DataLoader(Rows(), batch_sampler=Batches(), generator=torch.Generator())
    skips = nonfinite is not None and nonfinite.action == "skip"
    return Trainer(
        net,
        Criterion([loss or Parity()]),
        Optimization(optimizer, rate, CPU, may_skip=skips, **options),
        loader,
        max_epochs=max_epochs,
        device=CPU,
        hooks=hooks,
        nonfinite=nonfinite,
    )


class Recorder(Hook):
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def before_train(self, trainer):
        self.calls.append((self.name, "before_train", trainer.epoch, trainer.step))

    def before_epoch(self, trainer):
        self.calls.append((self.name, "before_epoch", trainer.epoch, trainer.step))

    def after_step(self, trainer):
        self.calls.append((self.name, "after_step", trainer.epoch, trainer.step))
        assert set(trainer.losses) == {"loss", "ce"}

    def save(self, trainer):
        self.calls.append((self.name, "save", trainer.epoch, trainer.step))

    def after_epoch(self, trainer):
        self.calls.append((self.name, "after_epoch", trainer.epoch, trainer.step))

    def after_train(self, trainer):
        self.calls.append((self.name, "after_train", trainer.epoch, trainer.step))


def test_hooks_are_called_in_order_with_the_documented_counters():
    calls = []
    make([Recorder("a", calls), Recorder("b", calls)], max_epochs=2).train()
    assert [call[1:] for call in calls[::2]] == [
        ("before_train", 0, 0),
        ("before_epoch", 0, 0),
        *[("after_step", 0, step) for step in (1, 2, 3)],
        ("save", 1, 3),
        ("after_epoch", 1, 3),
        ("before_epoch", 1, 3),
        *[("after_step", 1, step) for step in (4, 5, 6)],
        ("save", 2, 6),
        ("after_epoch", 2, 6),
        ("after_train", 2, 6),
    ]
    assert [call[0] for call in calls] == ["a", "b"] * 14


class Stop(Hook):
    """Stores the trainer's state after an epoch."""

    def __init__(self):
        self.states = []

    def save(self, trainer):
        self.states.append(copy.deepcopy(trainer.state_dict()))


def test_a_resumed_run_ends_with_the_same_bits():
    seed_everything(3)
    stop = Stop()
    whole = make([stop])
    whole.train()
    for state in stop.states[:2]:
        seed_everything(99)
        resumed = make([Stop()])
        resumed.load_state_dict(state)
        resumed.train()
        assert resumed.epoch == whole.epoch
        assert resumed.step == whole.step
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert (
            resumed.optimization.optimizer.state_dict()["param_groups"]
            == whole.optimization.optimizer.state_dict()["param_groups"]
        )


def test_a_resumed_run_begins_with_after_epoch_of_the_saved_epoch():
    stop, calls = Stop(), []
    make([stop]).train()
    resumed = make([Recorder("a", calls)])
    resumed.load_state_dict(stop.states[0])
    resumed.train()
    assert [call[1:] for call in calls[:3]] == [
        ("before_train", 1, 3),
        ("after_epoch", 1, 3),
        ("before_epoch", 1, 3),
    ]


def test_state_of_another_run_is_refused():
    state = make([Stop()]).state_dict()
    state["random"] *= 2
    with pytest.raises(ValueError, match="2 processes, but this run has 1"):
        make([Stop()]).load_state_dict(state)


class Counting(Hook):
    def __init__(self, name, count=0):
        self.name, self.count = name, count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_hooks_find_their_state_among_others(caplog):
    state = make([Counting("a", 1), Stop(), Counting("b", 2), Recorder("c", [])]).state_dict()
    same = make([Counting("a"), Counting("b"), Stop(), Recorder("c", [])])
    same.load_state_dict(state)
    assert [hook.count for hook in same.hooks[:2]] == [1, 2]
    assert not caplog.records
    other = make([Counting("a"), Bystander()])
    other.load_state_dict(state)
    assert other.hooks[0].count == 1
    assert [record.getMessage() for record in caplog.records] == [
        "The hooks have changed since the checkpoint was written: added Bystander; removed "
        "Counting, Stop, Recorder"
    ]


class Bystander(Hook):
    """A hook without a state."""


def step_once(batches, net, **options):
    trainer = make(net=net, warmup=0, **options)
    share = 1 / len(batches)
    for number, batch in enumerate(batches):
        trainer.run_step(batch, share=share, update=number + 1 == len(batches))
    return net.layer.weight.detach().clone()


def test_accumulated_batches_give_the_same_step_as_one_large_batch():
    rows = Rows()
    whole = Batch.of(rows.images)
    parts = [whole.map(lambda column, i=i: column[i : i + 4]) for i in (0, 4, 8)]
    net = Net().eval()
    first = step_once([whole], copy.deepcopy(net))
    second = step_once(parts, copy.deepcopy(net))
    torch.testing.assert_close(first, second)
    assert not torch.equal(first, net.layer.weight)


def test_a_smaller_last_group_is_averaged_over_its_batches():
    """Three batches in groups of two: the optimizer steps after the second and the third."""
    shares = []

    class Spy(Trainer):
        def run_step(self, batch, share=1.0, update=True):
            shares.append((share, update))
            super().run_step(batch, share, update)

    trainer = make(accumulation_steps=2, max_epochs=1)
    trainer.__class__ = Spy
    trainer.train()
    assert shares == [(0.5, False), (0.5, True), (1.0, True)]


def test_the_gradient_is_clipped():
    batch = Batch.of(torch.full((4, 3, 4, 4), 100.0))
    net = Net().eval()
    before = net.layer.weight.detach().clone()
    trainer = make(net=net, clip_grad_norm=1e-3, warmup=0)
    for group in trainer.optimization.optimizer.param_groups:
        group.update(weight_decay=0.0)
    trainer.run_step(batch)
    moved = (net.layer.weight.detach() - before).norm()
    assert 0 < float(moved) <= 1.001e-4


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_mixed_precision_trains_and_keeps_fp32_weights(amp):
    seed_everything(0)
    trainer = make(amp=amp, max_epochs=2)
    before = trainer.model.layer.weight.detach().clone()
    trainer.train()
    assert trainer.model.layer.weight.dtype == torch.float32
    assert torch.isfinite(trainer.model.layer.weight).all()
    assert not torch.equal(before, trainer.model.layer.weight)
    assert (trainer.state_dict()["scaler"] != {}) == (amp == "fp16")


class Normed(Net):
    """The same network with running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def logits(self, batch):
        return self.norm(super().logits(batch).float())


class Remembering(Parity):
    """Counts the batches of steps that were taken; the batches' losses have the given factors."""

    def __init__(self, *factors):
        super().__init__()
        self.factors = list(factors)
        self.register_buffer("memory", torch.zeros(()), persistent=False)

    def forward(self, embeddings, batch):
        return {"ce": self.factors.pop(0) * super().forward(embeddings, batch)["ce"]}

    def commit(self, embeddings, batch, *, taken=None):
        self.memory += 1 if taken is None else taken


OVERFLOW = 1e36  # a finite loss whose scaled gradient is not


@pytest.mark.parametrize("cause", [OVERFLOW, math.nan])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_skipped_step_leaves_no_trace_of_its_batches(cause, clip):
    images = Rows().images
    batches = [Batch.of(images[i : i + 4]) for i in (0, 4, 8)]
    loss = Remembering(0.1, 0.1, 0.1, cause, 0.1, 0.1)
    skipping = NonFiniteLosses("skip")
    trainer = make(net=Normed(), loss=loss, amp="fp16", clip_grad_norm=clip, nonfinite=skipping,
                   warmup=0, accumulation_steps=2)  # fmt: skip

    def state():
        held = {**dict(trainer.model.state_dict()), "memory": loss.memory}
        return {name: value.clone() for name, value in held.items()}

    def group(first, second):
        trainer.run_step(batches[first], share=0.5, update=False)
        trainer.run_step(batches[second], share=0.5, update=True)

    before = state()
    group(0, 1)
    taken = state()
    assert float(taken["memory"]) == 2
    assert not any(torch.equal(before[name], value) for name, value in taken.items())
    group(2, 0)
    assert all(torch.equal(taken[name], value) for name, value in state().items())
    group(1, 2)
    assert float(state()["memory"]) == 4
    assert not any(torch.equal(taken[name], value) for name, value in state().items())


def test_buffers_are_restored_without_waiting_for_the_device():
    """The device `meta` has no numbers, so reading one on the host would fail."""
    module = nn.BatchNorm1d(2).to("meta")
    BufferCopy(module).restore(torch.ones((), device="meta") > 0)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="amp: expected one of off, fp16, bf16, got 'half'"):
        make(amp="half")
    with pytest.raises(ValueError, match="accumulation_steps >= 1"):
        make(accumulation_steps=0)
