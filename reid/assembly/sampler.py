"""Builds the sampler of a config."""

from __future__ import annotations

from reid import distributed
from reid.config import Config
from reid.data.domain_samplers import TwoDomainSampler
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
        source_domains=config.datasets.source_domains,
    )
    group_size = config.model.bn_samples_per_group
    if config.model.domain_bn and config.datasets.domains == "all":
        _check_halves(sampler, group_size)
    if group_size and sampler.batch_size % group_size:
        raise ConfigError(
            "model.bn_samples_per_group: expected 0 or a divisor of the batch of "
            f"{sampler.batch_size} samples, got {group_size}"
        )
    return sampler


def _check_halves(sampler: LabelledSampler, group_size: int) -> None:
    """Requires batches of the source's images, then the target's, for `DomainBatchNorm`.

    Raises:
        ConfigError: The sampler gives no such batches, or they cannot be divided into groups.
    """
    if not isinstance(sampler, TwoDomainSampler):
        raise ConfigError(
            "dataloader.sampler: model.domain_bn needs batches of source and target images, as "
            f"TwoDomainSampler gives them, got {type(sampler).__name__}"
        )
    for name, half in (("source", sampler.source), ("target", sampler.target)):
        if group_size and half.batch_size % group_size:
            raise ConfigError(
                "model.bn_samples_per_group: expected 0 or a divisor of the "
                f"{half.batch_size} {name} images of a batch, got {group_size}"
            )
