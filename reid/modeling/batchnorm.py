"""BatchNorm whose statistics do not depend on how many processes share a batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reid import distributed
from reid.modeling.heads import Neck
from reid.registry import ConfigError


class GroupedBatchNorm(_BatchNorm):
    """BatchNorm over groups of consecutive samples of the whole batch, wherever they are.

    In training each group has a mean and a variance of its own. The running statistics are those
    of the first group alone, as with replicas on several GPUs (`torch.nn.DataParallel`, or
    DistributedDataParallel without synchronisation), whose first replica is kept. In evaluation it
    is a plain BatchNorm. A group with one value for each channel has no variance; it is normalised
    with the running statistics, which it leaves as they are. torch's own SyncBatchNorm knows no
    groups and no CPU.

    Args:
        like: The layer in whose place it stands; its parameters and buffers are taken over.
        group_size: Samples in a group; 0 = the whole batch. With several processes, the samples of
            a process must be a multiple of it, or it a multiple of them.

    Shape:
        (B, C) or (B, C, ...) to the same; B is this process's share of the batch.
    """

    def __init__(self, like: _BatchNorm, group_size: int) -> None:
        super().__init__(
            like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats
        )
        self.weight, self.bias = like.weight, like.bias
        self.running_mean, self.running_var = like.running_mean, like.running_var
        self.num_batches_tracked = like.num_batches_tracked
        self.train(like.training)
        self._group_size = group_size
        self._process_groups: dict[int, dist.ProcessGroup | None] = {}

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm: expected (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises.

        Raises:
            ConfigError: The groups cannot be cut from the processes' shares of the batch.
        """
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        count, size = len(input), self._group_size or len(input) * distributed.world_size()
        if size % count and count % size:
            raise ConfigError(
                f"model.bn_samples_per_group: {size} samples cannot be cut from {count} in each of "
                f"{distributed.world_size()} processes"
            )
        local, processes = min(size, count), max(size // count, 1)
        if distributed.world_size() % processes:
            raise ConfigError(
                f"model.bn_samples_per_group: {size} samples are the shares of {processes} "
                f"processes, but there are {distributed.world_size()}"
            )
        # (groups, samples of a group here, C, values of a sample), in single precision
        rows = input.float().reshape(count // local, local, self.num_features, -1)
        values = size * rows.shape[3]
        if values == 1:  # no variance
            self.eval()
            normalised = super().forward(input)
            self.train()
            return normalised
        mean = self._sum(rows, processes) / values
        centred = rows - mean[:, None, :, None]
        variance = self._sum(centred.square(), processes) / values
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        normalised = centred * scale[:, None, :, None]
        if self.affine:
            normalised = normalised + self.bias[:, None]
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (values / (values - 1)))
        return normalised.reshape(input.shape).to(input.dtype)

    def _sum(self, rows: Tensor, processes: int) -> Tensor:
        """(groups, C) sums over a group's samples and their values, those elsewhere among them."""
        total = rows.sum((1, 3))
        if processes > 1:
            total = distributed.sum_with_gradient(total, self._process_group(processes))
        return total

    def _process_group(self, processes: int) -> dist.ProcessGroup | None:
        """The processes that share this process's group of samples; every process calls it."""
        if processes not in self._process_groups:
            own = None
            if processes < distributed.world_size():
                own, _ = dist.new_subgroups(processes)
            self._process_groups[processes] = own
        return self._process_groups[processes]

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        first = torch.stack((mean[0], variance[0]))
        if distributed.is_distributed():
            dist.broadcast(first, src=0)  # the first group is the first process's
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(first[0], share)
        self.running_var.lerp_(first[1], share)


class GroupedNeck(GroupedBatchNorm):
    """The same for a `Neck`, in single precision whatever comes in."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) -> (B, D), in float32."""
        return super().forward(input.float())


def group_batch_norms(model: nn.Module, group_size: int) -> None:
    """Puts `GroupedBatchNorm` in the place of every BatchNorm of a model.

    Args:
        model: Changed in place; names of parameters and buffers stay.
        group_size: See `GroupedBatchNorm`.

    Raises:
        ConfigError: A layer is a BatchNorm with something of its own, such as an activation.
    """
    for name, module in [*model.named_modules()]:
        if not isinstance(module, _BatchNorm) or isinstance(module, GroupedBatchNorm):
            continue
        grouped: type[GroupedBatchNorm] = GroupedBatchNorm
        if isinstance(module, Neck):
            grouped = GroupedNeck
        elif type(module).forward is not _BatchNorm.forward:
            raise ConfigError(
                f"model: {name} is a {type(module).__name__}, which does more than BatchNorm; its "
                "statistics cannot be taken over groups of samples or over several processes"
            )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, grouped(module, group_size))
