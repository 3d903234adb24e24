"""BatchNorm over groups of samples, in one process; several are in tests/engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from reid.modeling.batchnorm import GroupedBatchNorm, group_batch_norms
from reid.modeling.heads import Neck
from reid.registry import ConfigError


def layer(kind: type[nn.Module], channels: int) -> nn.Module:
    torch.manual_seed(0)
    made = kind(channels)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (12, 5)), (nn.BatchNorm2d, (12, 5, 4, 3))]
)
def test_one_group_is_plain_batchnorm(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    plain = layer(kind, 5)
    grouped = GroupedBatchNorm(copy.deepcopy(plain), 0)
    image = 3 + 2 * torch.randn(shape)
    results = []
    for module in (plain, grouped):
        own = image.clone().requires_grad_()
        out = module(own)
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        results.append((out, own.grad, module.weight.grad, module.bias.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(grouped.state_dict()[name], expected, atol=1e-6, rtol=1e-6)
    plain.eval()
    grouped.eval()
    torch.testing.assert_close(grouped(image), plain(image), atol=1e-5, rtol=1e-5)


def test_each_group_is_as_if_it_were_alone() -> None:
    plain = layer(nn.BatchNorm2d, 5)
    grouped = GroupedBatchNorm(copy.deepcopy(plain), 4)
    image = torch.randn(12, 5, 4, 3) * torch.arange(1, 13)[:, None, None, None]
    found = grouped(image)
    for start in (0, 4, 8):
        alone = copy.deepcopy(plain)
        part = slice(start, start + 4)
        torch.testing.assert_close(found[part], alone(image[part]), atol=1e-5, rtol=1e-5)
        if start == 0:  # the first replica's statistics are those that are kept
            torch.testing.assert_close(grouped.running_mean, alone.running_mean)
            torch.testing.assert_close(grouped.running_var, alone.running_var)
    assert int(grouped.num_batches_tracked) == 1


def test_groups_that_cannot_be_cut() -> None:
    grouped = GroupedBatchNorm(nn.BatchNorm1d(3), 5)
    with pytest.raises(ConfigError, match=r"model\.bn_samples_per_group: 5 samples cannot be cut"):
        grouped(torch.randn(12, 3))
    grouped = GroupedBatchNorm(nn.BatchNorm1d(3), 24)
    with pytest.raises(ConfigError, match="24 samples are the shares of 2 processes"):
        grouped(torch.randn(12, 3))


def test_one_value_is_normalised_with_what_was_seen_before() -> None:
    grouped = GroupedBatchNorm(layer(nn.BatchNorm1d, 3), 1)
    before = copy.deepcopy(grouped.state_dict())
    feature = torch.randn(4, 3)
    found = grouped(feature)
    assert grouped.training
    assert all(torch.equal(before[name], value) for name, value in grouped.state_dict().items())
    torch.testing.assert_close(found, grouped.eval()(feature))


def test_every_layer_of_a_model_is_replaced() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.instance = nn.InstanceNorm2d(4)
            self.neck = Neck(4)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block(), nn.BatchNorm1d(4, affine=False))
    names = list(model.state_dict())
    weight = model[1].norm.weight
    group_batch_norms(model, 2)
    assert list(model.state_dict()) == names
    assert model[1].norm.weight is weight
    assert not model[1].neck.bias.requires_grad
    assert isinstance(model[1].instance, nn.InstanceNorm2d)
    assert sum(isinstance(module, GroupedBatchNorm) for module in model.modules()) == 3
    half = torch.randn(4, 4, dtype=torch.bfloat16)
    assert model[1].neck(half).dtype == torch.float32
    assert model[2](half).dtype == torch.bfloat16

    class WithActivation(nn.BatchNorm2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image).relu()

    with pytest.raises(ConfigError, match="model: 0 is a WithActivation, which does more"):
        group_batch_norms(nn.Sequential(WithActivation(3)), 2)
