"""Batches of two domains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reid.data.samplers import BatchSize, Draw, ImageSampler, LabelledSampler
from reid.registry import SAMPLER
from reid.structures import OUTLIER, PseudoLabels

_OTHER_SEEDS = 0x5DEECE66D


@SAMPLER.register()
class TwoDomainSampler(LabelledSampler):
    """Batches of images of the source, followed by images of the target, each by its own sampler.

    An epoch has as many batches as the target's sampler gives; the source's sampler begins anew as
    often as needed. With several processes, each takes its share of both parts.

    Args:
        source: Draws from the labelled sources.
        target: Draws from the target.
        source_domains: How many of the joined training sets, from the first on, are sources.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes.

    Attributes:
        source: As above.
        target: As above.

    Raises:
        ValueError: There is no source, or the numbers do not fit each other.
    """

    def __init__(
        self,
        source: LabelledSampler,
        target: LabelledSampler,
        source_domains: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if source_domains < 1:
            raise ValueError("expected source images, but datasets.source is not set")
        batch_size = source.batch_size + target.batch_size
        super().__init__(batch_size, 1, None, seed, rank, world_size)
        self.source = source
        self.target = target
        self._source_domains = source_domains
        self._is_source = torch.zeros(0, dtype=torch.bool)

    def group_ids(self, labels: PseudoLabels) -> Tensor:
        """The clusters; the parts' samplers have groups of their own."""
        return labels.cluster

    def set_domains(self, domains: Tensor) -> None:
        """Takes the number (N,) of each image's training set, before the first labels."""
        self._is_source = domains.cpu() < self._source_domains
        self.source.set_domains(domains)
        self.target.set_domains(domains)

    def set_labels(self, labels: PseudoLabels) -> None:
        """Takes the labels of an epoch.

        Raises:
            ValueError: One of the domains has no labelled image, or `set_domains` did not come
                first.
        """
        _check_domains(self, len(self._is_source), labels)
        super().set_labels(labels)
        for sampler, mine in ((self.source, self._is_source), (self.target, ~self._is_source)):
            rows = mine.nonzero()[:, 0]
            sampler.set_labels(labels[rows].scatter(rows, len(labels)))

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose batches come next, from 0."""
        super().set_epoch(epoch)
        self.source.set_epoch(epoch)
        self.target.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.target)

    def __iter__(self) -> Iterator[list[Draw]]:
        self._check_labels()
        # The two samplers have one seed; their images must not have the same augmentations.
        for source, target in zip(self._source_batches(), self.target, strict=False):
            yield [Draw(draw.index, draw.seed ^ _OTHER_SEEDS) for draw in source] + target

    def _source_batches(self) -> Iterator[list[Draw]]:
        """Batches of the source without end."""
        self.source.set_epoch(self._epoch)
        passes = 1 + len(self.target) // len(self.source)
        number = self._epoch * passes
        while True:
            self.source.set_epoch(number)
            yield from self.source
            number += 1


@SAMPLER.register()
class TargetImageSampler(ImageSampler):
    """All images of the target in random order, although they have no labels.

    As the target's part of a `TwoDomainSampler` beside losses for labelled images alone, it lets
    BatchNorm see the target while the source is trained (MMT).

    Args:
        batch_size: Images in a batch, over all processes.
        steps_per_epoch: Batches in an epoch; 0: one pass, without an incomplete last batch.
        source_domains: How many of the joined training sets, from the first on, are sources.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes.

    Raises:
        ValueError: The numbers do not fit each other.
    """

    def __init__(
        self,
        batch_size: BatchSize,
        steps_per_epoch: int = 0,
        source_domains: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, steps_per_epoch, seed, rank, world_size)
        self._source_domains = source_domains
        self._is_target = torch.zeros(0, dtype=torch.bool)

    def set_domains(self, domains: Tensor) -> None:
        """Takes the number (N,) of each image's training set, before the first labels."""
        self._is_target = domains.cpu() >= self._source_domains

    def group_ids(self, labels: PseudoLabels) -> Tensor:
        """Each image of the target is a group.

        Raises:
            ValueError: `set_domains` did not come first.
        """
        _check_domains(self, len(self._is_target), labels)
        return torch.where(self._is_target, torch.arange(len(labels)), OUTLIER)


def _check_domains(sampler: LabelledSampler, known: int, labels: PseudoLabels) -> None:
    """Requires that the domains of all labelled images are known.

    Raises:
        ValueError: `set_domains` did not come first.
    """
    if known != len(labels):
        raise ValueError(
            f"{type(sampler).__name__}: knows the domains of {known} images, but the labels are of "
            f"{len(labels)}; set_domains comes first"
        )
