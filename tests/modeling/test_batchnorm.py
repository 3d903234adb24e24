"""BatchNorm over groups of samples, in one process and in two; whole runs are in tests/engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

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
        if start == 0:  # only the first replica moves the running statistics
            torch.testing.assert_close(grouped.running_mean, alone.running_mean)
            torch.testing.assert_close(grouped.running_var, alone.running_var)
    assert int(grouped.num_batches_tracked) == 1


def test_all_groups_can_move_the_running_statistics_in_turn() -> None:
    plain = layer(nn.BatchNorm2d, 5)
    grouped = copy.deepcopy(nn.Sequential(plain))
    group_batch_norms(grouped, 4)
    group_batch_norms(grouped, 7, "all")  # a second time: other groups
    image = torch.randn(15, 5, 1, 1) * torch.arange(1, 16)[:, None, None, None]
    found = grouped(image)
    torch.testing.assert_close(found[:7], plain(image[:7]), atol=1e-5, rtol=1e-5)
    plain(image[7:14])  # the last group is one value for each channel: it moves nothing
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(getattr(grouped[0], name), expected, atol=1e-5, rtol=1e-5)


GROUPS = {0: [15], 4: [4, 4, 4, 3], 7: [7, 7, 1], 64: [15]}  # of 15 samples, by group size


def problem() -> tuple[nn.Module, Tensor]:
    plain = layer(nn.BatchNorm2d, 5)
    return plain, torch.randn(15, 5, 2, 3) * torch.arange(1, 16)[:, None, None, None]


def results(module: nn.Module, image: Tensor, first: int = 0) -> dict[str, Tensor]:
    """Output, gradients and buffers; `first` is the place of the first sample in the batch."""
    own = image.clone().requires_grad_()
    out = module(own)
    places = torch.arange(first * out[0].numel(), (first + len(out)) * out[0].numel())
    (out * places.view_as(out).sin()).sum().backward()
    found = {"output": out.detach(), "gradient": own.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return found | {name: buffer.float() for name, buffer in module.named_buffers()}


def check_groups(found: dict[str, Tensor], sizes: list[int]) -> None:
    """torch's BatchNorm on each group alone; only the first group moves the statistics."""
    plain, image = problem()
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    alone = [
        results(copy.deepcopy(plain), part, start)
        for part, start in zip(image.split(sizes), starts, strict=False)
    ]
    expected = {name: torch.cat([one[name] for one in alone]) for name in ("output", "gradient")}
    expected |= {
        name: torch.stack([one[name] for one in alone]).sum(0) for name in ("weight", "bias")
    }
    expected |= {name: alone[0][name] for name, _ in plain.named_buffers()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("group_size", GROUPS)
def test_the_last_group_may_be_smaller(group_size: int) -> None:
    plain, image = problem()
    check_groups(results(GroupedBatchNorm(plain, group_size), image), GROUPS[group_size])


def shuffled(plain: nn.Module) -> GroupedBatchNorm:
    grouped = GroupedBatchNorm(plain, 4)
    grouped.shuffle = 3
    return grouped


def test_groups_in_a_random_order_are_those_of_a_permuted_batch() -> None:
    plain, image = problem()
    place = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    expected = GroupedBatchNorm(copy.deepcopy(plain), 4)
    permuted = expected(image[place.argsort()])
    found = shuffled(plain)
    torch.testing.assert_close(found(image), permuted[place])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, msg=name)
    assert not torch.allclose(permuted[place], GroupedBatchNorm(problem()[0], 4)(image))


def process(rank: int, world_size: int) -> Any:
    found = {}
    for group_size in GROUPS:
        plain, image = problem()
        share, first = image.split([8, 7])[rank], 8 * rank
        found[group_size] = results(GroupedBatchNorm(plain, group_size), share, first)
    plain, image = problem()
    found[-1] = results(shuffled(plain), image.split([8, 7])[rank], 8 * rank)
    return found


def test_processes_with_unequal_shares(in_two_processes: Callable[..., list[Any]]) -> None:
    """As if one process could not read an image."""
    shares = in_two_processes(process)
    for group_size, sizes in GROUPS.items():
        first, second = (share[group_size] for share in shares)
        found = {name: torch.cat((first[name], second[name])) for name in ("output", "gradient")}
        found |= {name: first[name] + second[name] for name in ("weight", "bias")}
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(first[name], second[name])
            found[name] = first[name]
        check_groups(found, sizes)
    plain, image = problem()
    first, second = (share[-1] for share in shares)
    for name, value in results(shuffled(plain), image).items():
        joined = {"output": torch.cat, "gradient": torch.cat, "weight": sum, "bias": sum}
        both = joined.get(name, lambda pair: pair[0])((first[name], second[name]))
        torch.testing.assert_close(both, value, atol=2e-5, rtol=1e-5, msg=name)


def test_a_group_of_one_value_uses_the_running_statistics() -> None:
    grouped = GroupedBatchNorm(layer(nn.BatchNorm1d, 3), 1)
    before = copy.deepcopy(grouped.state_dict())
    feature = torch.randn(4, 3)
    found = grouped(feature)
    assert grouped.training
    assert all(torch.equal(before[name], value) for name, value in grouped.state_dict().items())
    torch.testing.assert_close(found, grouped.eval()(feature))
    grouped = GroupedBatchNorm(layer(nn.BatchNorm1d, 3), 3)
    found = grouped(feature)  # the last one is alone
    alone = GroupedBatchNorm(layer(nn.BatchNorm1d, 3), 0)
    alone(feature[:3])
    torch.testing.assert_close(grouped.running_mean, alone.running_mean)
    torch.testing.assert_close(found[3:], layer(nn.BatchNorm1d, 3).eval()(feature[3:]))


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


def test_layers_of_timm_that_drop_and_activate() -> None:
    plain = timm.create_model("test_efficientnet", num_classes=0).train()
    assert any(isinstance(module, BatchNormAct2d) for module in plain.modules())
    grouped = copy.deepcopy(plain)
    names = list(grouped.state_dict())
    group_batch_norms(grouped, 0)
    assert list(grouped.state_dict()) == names
    assert not any(type(module) is BatchNormAct2d for module in grouped.modules())
    image = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(grouped(image), plain(image), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grouped.eval()(image), plain.eval()(image), atol=1e-4, rtol=1e-4)

    dropping = BatchNormAct2d(3, drop_layer=lambda: nn.Dropout(1.0), act_layer=nn.Sigmoid)
    layers = nn.Sequential(dropping)
    group_batch_norms(layers, 2)
    assert torch.equal(layers(torch.randn(4, 3, 2, 2)), torch.full((4, 3, 2, 2), 0.5))
