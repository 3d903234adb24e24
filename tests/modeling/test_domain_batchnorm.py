"""BatchNorm with a half for each domain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.domain_batchnorm import (
    DomainSplit,
    has_domains,
    plain_state,
    split_batch_norms,
    statistics_of,
)
from reid.modeling.heads import Neck
from reid.structures import Batch


class Small(nn.Module):
    """The network of the oracle file."""

    def __init__(self, width: int = 8, out: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, out, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.feat_bn = Neck(out)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.relu(self.bn(self.conv(image)))
        hidden = F.relu(self.bn2(self.conv2(hidden))).mean((2, 3))
        return F.normalize(self.feat_bn(hidden), dim=1)


def batch(source: int, target: int) -> Batch:
    """A batch whose images do not matter."""
    domain = torch.cat((torch.zeros(source), torch.ones(target))).long()
    return Batch.of(torch.zeros(len(domain), 1))._replace(domain=domain)


def split_small(model: nn.Module, group_size: int = 0) -> DomainSplit:
    split = split_batch_norms(model, source_domains=1)
    group_batch_norms(model, group_size)
    return split


def close(found: Tensor, expected: Tensor, error: float, what: str) -> None:
    largest = max(float(expected.abs().max()), 1e-30)
    assert float((found.detach() - expected).abs().max()) <= error * largest, what


@pytest.mark.oracle
def test_numbers_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("spcl_dsbn*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}

        def ours(prefix: str, a: dict[str, Tensor] = a) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix)
                .replace(".BN_S.", ".source.")
                .replace(".BN_T.", ".target."): value
                for name, value in a.items()
                if name.startswith(prefix)
            }

        state = ours("state.")
        model = Small(*(state[name].shape[0] for name in ("conv.weight", "conv2.weight")))
        split = split_small(model)
        model.load_state_dict(state, strict=False)
        assert all(name in model.state_dict() for name in state)
        source, target = a["source_image"].float(), a["target_image"].float()
        split.see(batch(len(source), len(target)))
        output = model.train()(torch.cat((source, target)))
        expected = torch.cat((a["train_source"], a["train_target"]))
        close(output, expected, 1e-5, "training")
        (output * a["grad_out"]).sum().backward()
        grads = ours("grad.")
        parameters = dict(model.named_parameters())
        assert all(f"feat_bn.{half}.bias" in grads for half in ("source", "target"))
        for name, value in grads.items():
            grad = parameters[name].grad
            assert grad is not None, name
            close(grad, value, 1e-4, name)
        for name, value in ours("after.").items():
            close(model.state_dict()[name], value, 1e-5, name)
        model.eval()
        close(model(source), a["eval_source_image"], 1e-5, "source images, target statistics")
        close(model(target), a["eval_target_image"], 1e-5, "target images")
        with statistics_of(model, "source"):
            close(model(source), a["eval_source_statistics"], 1e-5, "source statistics")
        close(model(source), a["eval_source_image"], 1e-5, "target statistics again")


def test_each_half_is_a_plain_network() -> None:
    model = Small()
    plain = copy.deepcopy(model)
    split = split_small(model)
    assert has_domains(model)
    assert not has_domains(plain)
    images = torch.randn(11, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    split.see(batch(4, 7))  # batches of both need not have one size
    model.train()(images)
    for domain, part in (("source", images[:4]), ("target", images[4:])):
        alone = copy.deepcopy(plain)
        hidden = alone.conv(part)
        alone.train().bn(hidden)
        state = plain_state(model, domain)  # type: ignore[arg-type]
        assert state.keys() == alone.state_dict().keys()
        torch.testing.assert_close(state["bn.running_var"], alone.bn.running_var)
        alone.load_state_dict(state)
        with statistics_of(model, domain):  # type: ignore[arg-type]
            torch.testing.assert_close(model.eval()(part), alone.eval()(part))
    assert plain_state(plain).keys() == plain.state_dict().keys()


def test_a_batch_of_one_domain_moves_one_half() -> None:
    model = Small()
    split = split_small(model)
    before = copy.deepcopy(model.state_dict())
    split.see(batch(0, 5))
    model.train()(torch.randn(5, 3, 6, 4))
    moved = {name for name, value in model.state_dict().items() if not before[name].equal(value)}
    assert moved
    assert all(".target." in name for name in moved)


def test_a_batch_that_lost_an_image_is_counted() -> None:
    split = DomainSplit(1)
    split.sizes = (4, 4)
    unknown = batch(4, 4)._replace(domain=torch.full((8,), 9))
    split.see(unknown)  # of the known size: nobody looks at it
    assert split.count == 4
    split.see(batch(3, 4))
    assert split.count == 3


def test_a_teacher_has_a_split_of_its_own() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.split = split_small(model)
    other = copy.deepcopy(model)
    other.split.see(batch(2, 4))
    assert model.split.count == 0
    with statistics_of(other, "source"):
        assert model.split.tested == "target"


def test_groups_are_of_one_domain() -> None:
    model, half = nn.Sequential(nn.BatchNorm1d(5)), nn.Sequential(nn.BatchNorm1d(5))
    split = split_small(model, 4)
    group_batch_norms(half, 4)
    value = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    split.see(batch(8, 12))
    found = model.train()(value)
    torch.testing.assert_close(found[:8], half.train()(value[:8]))
    torch.testing.assert_close(found[8:], half.train()(value[8:]))


def trained(rank: int, processes: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Small()
    split = split_small(model, 4)
    image = torch.randn(24, 3, 6, 4)
    parts = (image[:8], image[8:])
    mine = [part.chunk(processes)[rank] for part in parts]
    split.see(batch(*(len(part) for part in mine)))
    model.train()(torch.cat(mine))
    return dict(model.state_dict())


def test_two_processes_have_the_statistics_of_one(
    in_two_processes: Callable[..., list[Any]],
) -> None:
    expected = trained(0, 1)
    for found in in_two_processes(trained):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)
