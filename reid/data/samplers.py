"""Samplers: which images come, and how long an epoch is.

A sampler yields whole batches. Its random choices depend on (seed, epoch, place in the epoch), not
on the number of processes or reading workers: every process makes the same batches and takes its
share of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain, islice
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from reid.registry import PART_OF, SAMPLER, Range
from reid.structures import OUTLIER, PseudoLabels

IntArray = npt.NDArray[np.int64]
BatchSize: TypeAlias = Annotated[int, Range(1, 65_536)]

_MOST_STEPS = 1_000_000_000  # of an epoch


class Draw(NamedTuple):
    """An image to read for training, with the seed of its augmentation.

    Attributes:
        index: Row in the dataset.
        seed: Seed of its augmentation.
    """

    index: int  # type: ignore[assignment]  # tuple.index is not used on a draw
    seed: int


class LabelledSampler(Sampler[list[Draw]], ABC):
    """Batches with a few images from each of some groups; the base of the samplers in SAMPLER.

    A pass visits every group once in random order; passes follow each other until the epoch has its
    batches. Groups at the end of a pass that do not fill a batch are left out. If there are fewer
    groups than a batch takes, groups come more than once in it. Groups that are too small repeat
    their images, each about equally often.

    Args:
        batch_size: Images in a batch, over all processes.
        images_per_group: Images of one group in a batch.
        steps_per_epoch: Batches in an epoch. 0: as many as one pass fills; None: enough for all
            labelled images; at least one in both cases.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes; each takes `batch_size / world_size` images of a batch.

    Attributes:
        batch_size: As above.

    Raises:
        ValueError: The numbers do not fit each other.
    """

    def __init__(
        self,
        batch_size: BatchSize,
        images_per_group: int,
        steps_per_epoch: int | None,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        if batch_size < 1 or images_per_group < 1 or batch_size % images_per_group:
            raise ValueError(
                f"batch_size: expected a multiple of the {images_per_group} images that are taken "
                f"of each group, got {batch_size}"
            )
        if batch_size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}"
            )
        if steps_per_epoch is not None and not 0 <= steps_per_epoch <= _MOST_STEPS:
            raise ValueError(
                f"steps_per_epoch: expected 0 to {_MOST_STEPS:,}, or null, got {steps_per_epoch}"
            )
        self.batch_size = batch_size
        self._groups_per_batch = batch_size // images_per_group
        self._images_per_group = images_per_group
        self._steps_per_epoch = steps_per_epoch
        self._seed = seed
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self._epoch = 0
        self._groups: list[IntArray] = []

    @abstractmethod
    def group_ids(self, labels: PseudoLabels) -> Tensor:
        """(N,) the group of each image, -1 = in none."""

    def set_labels(self, labels: PseudoLabels) -> None:
        """Takes the labels of an epoch.

        Raises:
            ValueError: No image is in any group.
        """
        ids = self.group_ids(labels).cpu().numpy()
        order = np.argsort(ids, kind="stable")
        order = order[ids[order] != OUTLIER]
        if not len(order):
            raise ValueError(
                f"{type(self).__name__}: none of {len(ids)} images has a label to draw by"
            )
        self._groups = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)

    def set_domains(self, domains: Tensor) -> None:
        """Takes the number (N,) of each image's training set, before the first labels."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose batches come next, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        self._check_labels()
        if self._steps_per_epoch is None:
            return max(1, sum(map(len, self._groups)) // self.batch_size)
        return self._steps_per_epoch or max(1, len(self._groups) // self._groups_per_batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        self._check_labels()
        rng = np.random.default_rng((self._seed, self._epoch))
        return self._batches(self._images(rng), rng)

    def _batches(self, images: Iterator[int], rng: np.random.Generator) -> Iterator[list[Draw]]:
        """This process's share of the epoch's batches, of images that come one after the other.

        An image's seed is drawn before the next image is asked for.
        """
        for _ in range(len(self)):
            batch = [
                Draw(int(index), int(rng.integers(2**63)))
                for index in islice(images, self.batch_size)
            ]
            yield batch[self._share]

    def _images(self, rng: np.random.Generator) -> Iterator[int]:
        """The images of all batches, pass after pass; no fewer than an epoch needs."""
        for group in self._passes(rng):
            yield from self._pick(group, rng)

    def _passes(self, rng: np.random.Generator) -> Iterator[IntArray]:
        count = len(self._groups)
        rest = count % self._groups_per_batch if count > self._groups_per_batch else 0
        while True:
            for number in rng.permutation(count)[: count - rest]:
                yield self._groups[number]

    def _pick(self, group: IntArray, rng: np.random.Generator) -> IntArray:
        count = self._images_per_group
        whole, rest = divmod(count, len(group))
        return np.concatenate([rng.permutation(group) for _ in range(whole)]
                              + [rng.permutation(group)[:rest]])  # fmt: skip

    def _check_labels(self) -> None:
        if not self._groups:
            raise RuntimeError(f"{type(self).__name__}: set_labels comes before the first epoch")


PART_OF[LabelledSampler] = SAMPLER


@SAMPLER.register()
class PKSampler(LabelledSampler):
    """Identity-balanced batches: P identities (or clusters) x K images (Hermans et al. 2017).

    Args:
        batch_size: P * K, over all processes.
        images_per_identity: K.
        steps_per_epoch: Batches in an epoch. 0: as many as one pass fills; None: enough for all
            labelled images; at least one in both cases.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes; each takes `batch_size / world_size` images of a batch.

    Raises:
        ValueError: The numbers do not fit each other.
    """

    def __init__(
        self,
        batch_size: BatchSize,
        images_per_identity: int = 4,
        steps_per_epoch: int | None = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, images_per_identity, steps_per_epoch, seed, rank, world_size)

    def group_ids(self, labels: PseudoLabels) -> Tensor:
        """The clusters."""
        return labels.cluster


@SAMPLER.register()
class ImageSampler(LabelledSampler):
    """All labelled images in random order, each once in a pass, whatever their clusters.

    Args:
        batch_size: Images in a batch, over all processes.
        steps_per_epoch: Batches in an epoch; 0: one pass, without an incomplete last batch.
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
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, 1, steps_per_epoch, seed, rank, world_size)

    def group_ids(self, labels: PseudoLabels) -> Tensor:
        """Each labelled image is a group."""
        number = torch.arange(len(labels), device=labels.cluster.device)
        return torch.where(labels.cluster != OUTLIER, number, OUTLIER)


@SAMPLER.register()
class CrossCameraSampler(PKSampler):
    """PK batches that show a cluster across cameras (Dai et al., *Cluster Contrast*, ACCV 2022).

    A cluster gives one image at random, then K - 1 images of other cameras, each with the same
    chance, or of the same camera if no other camera has any. No image is repeated if there are
    K - 1 of them. Cameras are known by the proxies of the labels, so clusters must be split by
    camera, as `CameraProxyClusterer` does; with other clusters, cameras are ignored (the method's
    camera-blind option). The arguments are those of `PKSampler`.
    """

    def set_labels(self, labels: PseudoLabels) -> None:
        """Takes the labels of an epoch.

        Raises:
            ValueError: No image is in any group.
        """
        super().set_labels(labels)
        self._proxy = labels.proxy.cpu().numpy()

    def _pick(self, group: IntArray, rng: np.random.Generator) -> IntArray:
        count = self._images_per_group - 1
        first = rng.choice(group)
        others = group[self._proxy[group] != self._proxy[first]]
        if not len(others):
            others = group[group != first] if len(group) > 1 else group
        return np.append(first, rng.choice(others, count, replace=len(others) < count))


@SAMPLER.register()
class ProxyBalancedSampler(LabelledSampler):
    """Batches of proxies x images of each (CAP; O2CAP; TMGF, section 3).

    A proxy with too few images repeats them as CAP's code does: Z are chosen from its list repeated
    Z times.

    Args:
        batch_size: Images in a batch, over all processes.
        images_per_proxy: Z, images of one proxy in a batch.
        steps_per_epoch: Batches in an epoch. 0: as many as one pass fills; None: enough for all
            labelled images; at least one in both cases.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes; each takes `batch_size / world_size` images of a batch.

    Raises:
        ValueError: The numbers do not fit each other.
    """

    def __init__(
        self,
        batch_size: BatchSize,
        images_per_proxy: int = 4,
        steps_per_epoch: int | None = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, images_per_proxy, steps_per_epoch, seed, rank, world_size)

    def group_ids(self, labels: PseudoLabels) -> Tensor:
        """The proxies."""
        return labels.proxy

    def _pick(self, group: IntArray, rng: np.random.Generator) -> IntArray:
        count = self._images_per_group
        many = np.tile(group, count) if len(group) < count else group
        return rng.permutation(many)[:count]


@SAMPLER.register()
class RandomIdentitySampler(LabelledSampler):
    """Identities x images of each, in rounds that cut every identity's images into groups once.

    The sampler of the supervised baselines (TransReID, fast-reid). A round shuffles the images of
    each identity (or cluster) and cuts them into groups of `images_per_identity`, without the rest;
    an identity with fewer images has one group with repetitions. Each batch takes one group from
    each of some random identities that still have a group. The round ends when fewer identities
    than a batch needs still have one. If there are too few identities from the start, they come
    several times in a batch, and a batch may span rounds.

    Args:
        batch_size: Images in a batch, over all processes.
        images_per_identity: Images of one identity in a batch.
        epoch: `round`: an epoch is a round (TransReID), so epochs differ somewhat in length.
            `images`: an epoch is images // batch_size batches; it may end inside a round, where the
            next epoch goes on (fast-reid).
        steps_per_epoch: Batches of an epoch, in place of `epoch`; each epoch begins with a new
            round (PCL-CLIP). 0: as `epoch` says.
        seed: Seed of all random choices.
        rank: This process.
        world_size: All processes.

    Raises:
        ValueError: The numbers do not fit each other.
    """

    def __init__(
        self,
        batch_size: BatchSize,
        images_per_identity: int = 4,
        epoch: Literal["round", "images"] = "round",
        steps_per_epoch: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._by_images = epoch == "images" and not steps_per_epoch
        steps = None if self._by_images else steps_per_epoch
        super().__init__(batch_size, images_per_identity, steps, seed, rank, world_size)
        self._starts = [(0, 0)]
        self._last_round: tuple[int, list[IntArray]] = (-1, [])

    def group_ids(self, labels: PseudoLabels) -> Tensor:
        """The clusters."""
        return labels.cluster

    def set_labels(self, labels: PseudoLabels) -> None:
        """Takes the labels of an epoch.

        Raises:
            ValueError: No image has an identity.
        """
        super().set_labels(labels)
        self._starts = [(0, 0)]
        self._last_round = (-1, [])

    def __len__(self) -> int:
        """Batches in the epoch that is set."""
        self._check_labels()
        if self._by_images or self._steps_per_epoch:
            return super().__len__()
        return max(1, len(self._round(self._epoch)) // self._groups_per_batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        self._check_labels()
        rng = np.random.default_rng((self._seed, self._epoch, 1))  # rounds have (seed, number, 0)
        return self._batches(chain.from_iterable(self._groups_from(*self._start())), rng)

    def _start(self) -> tuple[int, int]:
        """The round, counted from epoch 0, and the group in it with which the epoch starts."""
        if not self._by_images:
            most = (self._steps_per_epoch or 0) * self._groups_per_batch  # rounds in an epoch
            return self._epoch * max(1, most), 0
        while len(self._starts) <= self._epoch:
            number, place = self._starts[-1]
            place += len(self) * self._groups_per_batch
            while place >= (length := len(self._round(number))):
                number, place = number + 1, place - length
            self._starts.append((number, place))
        return self._starts[self._epoch]

    def _groups_from(self, number: int, place: int) -> Iterator[IntArray]:
        """The groups of a round from a place on, then those of all later rounds."""
        while True:
            yield from self._round(number)[place:]
            number, place = number + 1, 0

    def _round(self, number: int) -> list[IntArray]:
        """The groups of a round in order; the same at every call."""
        if self._last_round[0] == number:
            return self._last_round[1]
        rng = np.random.default_rng((self._seed, number, 0))
        left = [self._cut(group, rng) for group in self._groups]
        at_once = min(self._groups_per_batch, len(left))
        groups: list[IntArray] = []
        while len(left) >= at_once:
            chosen = rng.choice(len(left), at_once, replace=False)
            groups += [left[place].pop() for place in chosen]
            for place in sorted(chosen, reverse=True):
                if not left[place]:  # move the last one here
                    left[place] = left[-1]
                    left.pop()
        self._last_round = (number, groups)
        return groups

    def _cut(self, group: IntArray, rng: np.random.Generator) -> list[IntArray]:
        size = self._images_per_group
        if len(group) < size:
            return [rng.choice(group, size)]
        shuffled = rng.permutation(group)
        return [shuffled[start : start + size] for start in range(0, len(group) - size + 1, size)]
