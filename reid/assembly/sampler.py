"""Builds the sampler of a config."""

from __future__ import annotations

from reid import distributed
from reid.config import Config
from reid.data.samplers import LabelledSampler
from reid.registry import SAMPLER, ConfigError, build


def build_sampler(config: Config) -> LabelledSampler:
    """Builds the sampler, which chooses the images of this process's batches.

    Raises:
        ConfigError: The sampler is unknown, an option is wrong, or the batch cannot be divided into
            BatchNorm's groups.
    """
    sampler: LabelledSampler = build(
        SAMPLER,
        config.dataloader.sampler,
        "dataloader.sampler",
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    group_size = config.model.bn_samples_per_group
    if group_size and sampler.batch_size % group_size:
        raise ConfigError(
            "model.bn_samples_per_group: expected 0 or a divisor of the batch of "
            f"{sampler.batch_size} samples, got {group_size}"
        )
    return sampler
