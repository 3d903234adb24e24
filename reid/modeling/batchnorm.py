"""BatchNorm whose statistics do not depend on how many processes share a batch."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from reid import distributed
from reid.modeling.heads import Neck
from reid.registry import ConfigError


def wrong_statistic(name: str, value: Tensor) -> str:
    """Why a tensor is no running statistic of a BatchNorm layer; empty: it may be one, or is none.

    Args:
        name: Of the tensor in its module.
        value: Of any shape.
    """
    if name.endswith("running_var") and bool((value < 0).any()):
        return "a variance is below 0"
    if name.endswith("num_batches_tracked") and bool(((value < 0) | (value > 2**53)).any()):
        return "expected a number of batches from 0"
    return ""


Running = Literal["first", "all"]
"""Which groups of a batch move the running statistics; see `GroupedStatistics`."""


class GroupedStatistics:
    """A layer whose statistics in training are those of groups of consecutive samples.

    Attributes:
        group_size: Samples in a group; 0 = the whole batch, over all processes. If it does not
            divide the batch (an image could not be read), the last group is smaller.
        running: `first`: only the first group moves the running statistics, as with replicas on
            several GPUs (`torch.nn.DataParallel`, or DistributedDataParallel without
            synchronisation), where the first replica's are saved. `all`: each group moves them, one
            after the other, as with one forward pass for each group.
    """

    group_size: int = 0
    running: Running = "first"


class GroupedBatchNorm(GroupedStatistics, _BatchNorm):
    """BatchNorm over groups of consecutive samples of the whole batch, on any process.

    In training each group is normalised with its own mean and variance. In evaluation it is a plain
    BatchNorm. A group with one value for each channel has no variance; it is normalised with the
    running statistics and does not move them. torch's SyncBatchNorm has no groups and does not run
    on a CPU.

    Args:
        like: The layer that it replaces, and whose parameters and buffers it takes over.
        group_size: See `GroupedStatistics`.
        running: See `GroupedStatistics`.

    Attributes:
        shuffle: Seed of a random order of the batch, whose consecutive samples are the groups
            (ShuffleBN: He et al., *Momentum Contrast*, CVPR 2020). None: the batch's own order.

    Shape:
        (B, C) or (B, C, ...) to the same; B is this process's share of the batch, and may differ
        from the other processes'.
    """

    def __init__(self, like: _BatchNorm, group_size: int, running: Running = "first") -> None:
        super().__init__(
            like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats
        )
        self.weight, self.bias = like.weight, like.bias
        self.running_mean, self.running_var = like.running_mean, like.running_var
        self.num_batches_tracked = like.num_batches_tracked
        self.train(like.training)
        self.group_size, self.running = group_size, running
        self.shuffle: int | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm: expected (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        groups = SampleGroups(len(input), self.group_size, self.shuffle, input.device)
        # (B, C, values of a sample), in single precision
        rows = input.float().reshape(len(input), self.num_features, -1)
        sums = groups.sum(torch.cat((rows.sum(2), rows.new_ones(len(rows), 1)), 1))
        values = sums[:, -1:].detach() * rows.shape[2]
        mean = sums[:, :-1] / values
        if self.running_mean is not None:
            mean = torch.where(values > 1, mean, self.running_mean)
        centred = rows - groups.of_samples(mean)[..., None]
        variance = groups.sum(centred.square().sum(2)) / values
        if self.running_var is not None:
            variance = torch.where(values > 1, variance, self.running_var)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        normalised = centred * groups.of_samples(scale)[..., None]
        if self.affine:
            normalised = normalised + self.bias[:, None]
        if self.track_running_stats:
            self._track(mean, variance, values)
        return normalised.reshape(input.shape).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, values: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        unbiased = variance * (values / (values - 1).clamp(min=1))
        for group in range(1 if self.running == "first" else len(values)):
            several = values[group, 0] > 1
            self.num_batches_tracked.add_(several)
            share: float | Tensor = (
                1 / self.num_batches_tracked.clamp(min=1)
                if self.momentum is None
                else self.momentum
            )
            if group:  # of a group without a variance, `mean` and `variance` are older statistics
                share = share * several
            self.running_mean.lerp_(mean[group], share)
            self.running_var.lerp_(unbiased[group], share)


class SampleGroups:
    """Groups of consecutive samples of the whole batch, and this process's samples in them.

    Args:
        count: Samples of this process.
        size: Samples in a group, the last of which may be smaller; 0: the whole batch is one.
        shuffle: Seed of the order in which the samples form groups; None: that of the batch.
        device: Of the samples, if they are shuffled.
    """

    def __init__(
        self,
        count: int,
        size: int,
        shuffle: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        counts, rank = [count], 0
        if size:  # with a single group, positions do not matter
            counts, rank = distributed.gather_counts(count), distributed.rank()
        before = sum(counts[:rank])
        self._size = size or count
        self._local = slice(before, before + count)
        self._padding = (0, 0, before, -sum(counts) % self._size + sum(counts[rank + 1 :]))
        self._place: Tensor | None = None
        if size and shuffle is not None:
            self._place = _random_places(shuffle, sum(counts), device)[self._local]

    def sum(self, samples: Tensor) -> Tensor:
        """The sums (G, D) of samples (B, D) over each group, over all processes."""
        if self._place is None:
            padded = F.pad(samples, self._padding)
        else:
            rows = sum(self._padding) + len(samples)
            padded = samples.new_zeros(rows, samples.shape[1])
            padded = padded.index_copy(0, self._place, samples)
        sums = padded.reshape(-1, self._size, samples.shape[1]).sum(1)
        return distributed.sum_with_gradient(sums)

    def of_samples(self, groups: Tensor) -> Tensor:
        """Rows (B, D): for each sample the row of its group, from (G, D)."""
        rows = groups.repeat_interleave(self._size, 0)
        return rows[self._local] if self._place is None else rows[self._place]


@functools.lru_cache(maxsize=4)
def _random_places(seed: int, count: int, device: torch.device | None) -> Tensor:
    """The place (count,) of each sample of a batch in a random order; every layer asks for it."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.to(device)


class GroupedNeck(GroupedBatchNorm):
    """The same for a `Neck`, in single precision whatever comes in."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) -> (B, D), in float32."""
        return super().forward(input.float())


class GroupedBatchNormAct(GroupedBatchNorm):
    """The same for timm's `BatchNormAct2d`, which drops and activates what it has normalised."""

    def __init__(self, like: BatchNormAct2d, group_size: int, running: Running = "first") -> None:
        super().__init__(like, group_size, running)
        self.drop, self.act = like.drop, like.act

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


_GROUPED: dict[object, type[GroupedBatchNorm]] = {
    _BatchNorm.forward: GroupedBatchNorm,
    Neck.forward: GroupedNeck,
    BatchNormAct2d.forward: GroupedBatchNormAct,
}
"""The class that replaces a layer of each kind."""


def group_batch_norms(model: nn.Module, group_size: int, running: Running = "first") -> None:
    """Gives every BatchNorm of a model statistics by groups.

    Args:
        model: Changed in place: a plain BatchNorm is replaced by `GroupedBatchNorm`, other layers
            with `GroupedStatistics` get new groups. Names of parameters and buffers stay.
        group_size: See `GroupedStatistics`.
        running: See `GroupedStatistics`.

    Raises:
        ConfigError: A layer is a kind of BatchNorm for which there is no replacement.
    """
    for name, module in [*model.named_modules()]:
        if isinstance(module, GroupedStatistics):
            module.group_size, module.running = group_size, running
            continue
        if not isinstance(module, _BatchNorm):
            continue
        grouped = _GROUPED.get(type(module).forward)
        if grouped is None:
            raise ConfigError(
                f"model: {name} is a {type(module).__name__}, which does more than BatchNorm; its "
                "statistics cannot be taken over groups of samples or over several processes"
            )
        parent, _, attribute = name.rpartition(".")
        new = grouped(module, group_size, running)
        setattr(model.get_submodule(parent), attribute, new)
