"""Batches of two domains."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from reid.data.domain_samplers import TargetImageSampler, TwoDomainSampler
from reid.data.samplers import Draw, PKSampler, RandomIdentitySampler
from reid.structures import PseudoLabels

DOMAINS = torch.cat((torch.zeros(24), torch.ones(40))).long()
LABELS = PseudoLabels.from_clusters(
    torch.cat((torch.arange(24) // 4, 6 + torch.arange(36) // 4, torch.full((4,), -1)))
)


def sampler(rank: int = 0, world_size: int = 1, steps: int = 5) -> TwoDomainSampler:
    processes = {"seed": 3, "rank": rank, "world_size": world_size}
    made = TwoDomainSampler(
        PKSampler(8, 4, **processes),
        PKSampler(16, 4, steps, **processes),
        source_domains=1,
        **processes,
    )
    made.set_domains(DOMAINS)
    made.set_labels(LABELS)
    return made


def test_a_batch_is_source_images_and_then_target_images() -> None:
    two = sampler()
    assert two.batch_size == 24
    batches = list(two)
    assert len(batches) == len(two) == 5  # the target's; a pass of the source has three
    for batch in batches:
        domains = [int(DOMAINS[draw.index]) for draw in batch]
        assert domains == [0] * 8 + [1] * 16
        assert all(LABELS.cluster[draw.index] >= 0 for draw in batch)
        assert len({draw.seed for draw in batch}) == 24
    drawn = {draw.index for batch in batches[:3] for draw in batch[:8]}
    assert drawn == set(range(24))  # a whole pass


def test_epochs_differ_and_repeat() -> None:
    two, epochs = sampler(), []
    for epoch in range(4):
        two.set_epoch(epoch)
        epochs.append(list(two))
    assert all(one != other for one, other in pairwise(epochs))
    assert all(one[0][:8] != other[0][:8] for one, other in pairwise(epochs))
    two.set_epoch(1)
    assert list(two) == epochs[1]


def test_processes_share_both_parts() -> None:
    whole = list(sampler())
    shares = [list(sampler(rank, 2)) for rank in range(2)]
    for batch, one, other in zip(whole, *shares, strict=True):
        assert one[:4] + other[:4] == batch[:8]
        assert one[4:] + other[4:] == batch[8:]


def test_a_source_whose_rounds_differ_in_length() -> None:
    two = TwoDomainSampler(RandomIdentitySampler(8), PKSampler(8, 4, 7), source_domains=1)
    two.set_domains(DOMAINS)
    two.set_labels(LABELS)
    batches: list[list[Draw]] = list(two)
    assert [len(batch) for batch in batches] == [16] * 7


def test_both_domains_need_labels() -> None:
    two = sampler()
    with pytest.raises(ValueError, match="PKSampler: none of 64 images has a label"):
        two.set_labels(PseudoLabels.from_clusters(torch.where(DOMAINS == 0, -1, 0)))
    with pytest.raises(ValueError, match="set_domains comes first"):
        TwoDomainSampler(PKSampler(8), PKSampler(8), source_domains=1).set_labels(LABELS)
    with pytest.raises(ValueError, match=r"datasets\.source is not set"):
        TwoDomainSampler(PKSampler(8), PKSampler(8))


def test_the_target_is_drawn_without_labels_beside_the_source() -> None:
    unlabelled = PseudoLabels.from_clusters(torch.where(DOMAINS == 0, LABELS.cluster, -1))
    two = TwoDomainSampler(
        PKSampler(8, 4), TargetImageSampler(16, 5, source_domains=1), source_domains=1
    )
    two.set_domains(DOMAINS)
    two.set_labels(unlabelled)
    batches = list(two)
    assert len(batches) == 5
    for batch in batches:
        assert [int(DOMAINS[draw.index]) for draw in batch] == [0] * 8 + [1] * 16
    drawn = [draw.index for batch in batches[:2] for draw in batch[8:]]
    assert len(set(drawn)) == 32, "each image of the target comes once in a pass"
    with pytest.raises(ValueError, match="set_domains comes first"):
        TargetImageSampler(4, source_domains=1).set_labels(unlabelled)
