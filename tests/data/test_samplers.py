from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from reid.data.samplers import (
    CrossCameraSampler,
    Draw,
    ImageSampler,
    LabelledSampler,
    PKSampler,
    ProxyBalancedSampler,
    RandomIdentitySampler,
)
from reid.structures import PseudoLabels


def labels(sizes: list[int], outliers: int = 3) -> PseudoLabels:
    cluster = torch.repeat_interleave(
        torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)
    )
    cluster = torch.cat((torch.full((outliers,), -1), cluster))
    return PseudoLabels.from_clusters(cluster, torch.arange(len(cluster)) % 2)


def epoch(sampler: LabelledSampler, number: int) -> list[list[Draw]]:
    sampler.set_epoch(number)
    return list(sampler)


def test_every_labelled_image_once_in_a_pass() -> None:
    sampler = ImageSampler(4)
    sampler.set_labels(labels([5, 1, 3], outliers=2))
    batches = epoch(sampler, 0)
    drawn = [draw.index for draw in chain(*batches)]
    assert len(batches) == len(sampler) == 2  # the ninth image fills no batch
    assert len(set(drawn)) == 8
    assert set(drawn) <= set(range(2, 11))
    assert [draw.index for draw in chain(*epoch(sampler, 1))] != drawn
    sampler.set_labels(labels([1, 1], outliers=1))
    assert sorted(draw.index for draw in chain(*epoch(sampler, 0))) == [1, 1, 2, 2]


def test_pk_batches() -> None:
    found = labels([4, 5, 6, 7, 8, 9, 10, 11, 12])
    sampler = PKSampler(16, images_per_identity=4)
    sampler.set_labels(found)
    batches = epoch(sampler, 0)
    assert len(batches) == len(sampler) == 2
    for batch in batches:
        assert len({draw.index for draw in batch}) == 16
        counts = Counter(int(found.cluster[draw.index]) for draw in batch)
        assert sorted(counts.values()) == [4, 4, 4, 4]
        assert -1 not in counts


def test_proxies_pass_by_pass() -> None:
    found = labels([6] * 5)
    sampler = ProxyBalancedSampler(8, images_per_proxy=4, steps_per_epoch=15)
    sampler.set_labels(found)
    batches = epoch(sampler, 3)
    assert len(batches) == len(sampler) == 15
    visits = [int(found.proxy[draw.index]) for batch in batches for draw in batch[::4]]
    for start in range(0, 30, 10):  # every pass visits each of the 10 proxies once
        assert sorted(visits[start : start + 10]) == list(range(10))
    for batch in batches:
        for start in (0, 4):
            assert len({int(found.proxy[d.index]) for d in batch[start : start + 4]}) == 1


def test_small_groups_repeat_evenly() -> None:
    sampler = PKSampler(7, images_per_identity=7, steps_per_epoch=30)
    sampler.set_labels(labels([3], outliers=0))
    for batch in epoch(sampler, 0):
        assert sorted(Counter(draw.index for draw in batch).values()) == [2, 2, 3]


def test_fewer_groups_than_a_batch_takes() -> None:
    sampler = ProxyBalancedSampler(32, images_per_proxy=4)
    sampler.set_labels(labels([4]))
    (batch,) = epoch(sampler, 0)
    assert len(batch) == 32


def test_a_rest_that_fills_no_batch_is_left_out() -> None:
    found = labels([4] * 7, outliers=0)
    sampler = PKSampler(8, images_per_identity=4, steps_per_epoch=30)
    sampler.set_labels(found)
    batches = epoch(sampler, 0)
    for start in range(0, 30, 3):  # a pass fills three batches, one cluster is left over
        visits = [int(found.cluster[d.index]) for b in batches[start : start + 3] for d in b[::4]]
        assert len(set(visits)) == 6


def test_an_epoch_of_as_many_images_as_are_labelled() -> None:
    sampler = ProxyBalancedSampler(8, images_per_proxy=4, steps_per_epoch=None)
    sampler.set_labels(labels([9, 9, 9, 8], outliers=20))
    assert len(sampler) == len(epoch(sampler, 0)) == 35 // 8
    sampler.set_labels(labels([1, 1]))
    assert len(sampler) == 1


def test_small_proxies_are_drawn_from_their_list_repeated() -> None:
    sampler = ProxyBalancedSampler(4, images_per_proxy=4, steps_per_epoch=300)
    sampler.set_labels(PseudoLabels.from_clusters(torch.zeros(2, dtype=torch.int64)))
    counts = Counter(sum(draw.index for draw in batch) for batch in epoch(sampler, 0))
    # Of 0 and 1, four times each, four are drawn: all of one kind in 2 of 70 cases.
    assert counts[2] > counts[1] > counts[0] + counts[4] > 0


def test_other_cameras_first() -> None:
    cluster = torch.tensor([0] * 6 + [1] * 4 + [2] + [-1])
    camids = torch.tensor([0, 0, 0, 1, 1, 2] + [3] * 4 + [0, 0])
    found = PseudoLabels.from_clusters(cluster, camids)
    sampler = CrossCameraSampler(4, images_per_identity=4, steps_per_epoch=120)
    sampler.set_labels(found)
    for batch in epoch(sampler, 0):
        first, *rest = [draw.index for draw in batch]
        assert {int(cluster[i]) for i in rest} == {int(cluster[first])}
        if cluster[first] == 0:
            assert all(camids[i] != camids[first] for i in rest)
            others = int((camids[:6] != camids[first]).sum())
            assert len(set(rest)) == 3 or others < 3
        elif cluster[first] == 1:  # one camera: its other images
            assert sorted([first, *rest]) == [6, 7, 8, 9]
        else:
            assert [first, *rest] == [10] * 4
    blind = CrossCameraSampler(4, images_per_identity=4, steps_per_epoch=60)
    blind.set_labels(PseudoLabels.from_clusters(cluster))
    pairs = [[d.index for d in batch] for batch in epoch(blind, 0) if batch[0].index < 6]
    assert any(camids[first] == camids[i] for first, *rest in pairs for i in rest)
    assert all(len(set(batch)) == 4 for batch in pairs)


def test_epochs_differ_and_repeat() -> None:
    def draw(seed: int, number: int) -> list[list[Draw]]:
        sampler = PKSampler(16, steps_per_epoch=3, seed=seed)
        sampler.set_labels(labels([9] * 8))
        return epoch(sampler, number)

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(0, 1)
    assert draw(0, 0) != draw(1, 0)


def test_processes_share_the_same_batch() -> None:
    def draw(rank: int, world_size: int) -> list[list[Draw]]:
        sampler = ProxyBalancedSampler(16, steps_per_epoch=4, rank=rank, world_size=world_size)
        sampler.set_labels(labels([5] * 7))
        return epoch(sampler, 2)

    shares = [draw(rank, 4) for rank in range(4)]
    assert [[*chain(*parts)] for parts in zip(*shares, strict=True)] == draw(0, 1)


def test_errors() -> None:
    with pytest.raises(ValueError, match="a multiple of the 4 images"):
        PKSampler(30)
    with pytest.raises(ValueError, match="a multiple of the 3 processes"):
        PKSampler(32, world_size=3)
    with pytest.raises(ValueError, match="expected 0 to 1,000,000,000, or null, got -1"):
        PKSampler(32, steps_per_epoch=-1)
    sampler = PKSampler(32)
    with pytest.raises(RuntimeError, match="set_labels comes before"):
        next(iter(sampler))
    with pytest.raises(ValueError, match="none of 3 images has a label"):
        sampler.set_labels(labels([], outliers=3))


def identity_sampler(sizes: list[int], **options: Any) -> tuple[RandomIdentitySampler, Tensor]:
    found = labels(sizes)
    sampler = RandomIdentitySampler(**({"batch_size": 12, "images_per_identity": 3} | options))
    sampler.set_labels(found)
    return sampler, found.cluster


@pytest.mark.parametrize("seed", range(5))
def test_a_round_of_identities(seed: int) -> None:
    """TransReID's pass: groups of unused images until fewer than P identities have one."""
    sizes = [3, 3, 5, 6, 8, 9, 9, 12, 2, 1]
    sampler, cluster = identity_sampler(sizes, seed=seed)
    batches = epoch(sampler, seed)
    assert len(batches) == len(sampler)
    left = {number: max(1, size // 3) for number, size in enumerate(sizes)}
    for batch in batches:
        identities = [int(cluster[draw.index]) for draw in batch]
        for start in range(0, 12, 3):
            assert len(set(identities[start : start + 3])) == 1
        present = set(identities)
        assert len(present) == 4
        for identity in present:
            left[identity] -= 1
    assert min(left.values()) >= 0
    assert sum(count > 0 for count in left.values()) < 4  # no further batch was possible
    seen = Counter(draw.index for batch in batches for draw in batch)
    repeated = {int(cluster[index]) for index, count in seen.items() if count > 1}
    assert repeated <= {8, 9}  # those of fewer than three images


def test_fast_reids_epochs_continue_the_round() -> None:
    sizes = [4, 5, 7, 6, 8, 9, 3, 12]
    sampler, _ = identity_sampler(sizes, epoch="images")
    numbers = range(7)
    whole = {number: epoch(sampler, number) for number in numbers}
    assert {len(batches) for batches in whole.values()} == {sum(sizes) // 12} == {len(sampler)}
    stream = [[draw.index for draw in batch] for number in numbers for batch in whole[number]]
    rounds, _ = identity_sampler(sizes)
    expected = [[d.index for d in batch] for number in range(14) for batch in epoch(rounds, number)]
    assert len(stream) == 28
    assert stream == expected[:28]
    again, _ = identity_sampler(sizes, epoch="images")
    assert epoch(again, 5) == whole[5]  # as a resumed run asks for it


def test_an_image_comes_with_other_augmentation_in_each_epoch() -> None:
    sampler, _ = identity_sampler([3] * 4)
    seeds = [draw.seed for number in range(3) for batch in epoch(sampler, number) for draw in batch]
    assert len(set(seeds)) == len(seeds) == 36


@pytest.mark.parametrize("rule", ["round", "images"])
def test_fewer_identities_than_a_batch_takes_come_several_times(rule: Any) -> None:
    for sizes in ([5, 1], [1, 1, 1], [40]):
        sampler, cluster = identity_sampler(sizes, epoch=rule)
        for number in range(3):
            batches = epoch(sampler, number)
            assert len(batches) == len(sampler) >= 1
            for batch in batches:
                assert len(batch) == 12
                counts = Counter(int(cluster[draw.index]) for draw in batch)
                assert min(2, len(sizes)) <= len(counts) <= len(sizes)
                assert all(count % 3 == 0 for count in counts.values())


def test_processes_share_the_batches_of_a_round() -> None:
    whole = epoch(identity_sampler([6] * 9)[0], 2)
    shares = [epoch(identity_sampler([6] * 9, rank=r, world_size=3)[0], 2) for r in range(3)]
    assert [[*chain(*parts)] for parts in zip(*shares, strict=True)] == whole


def test_epochs_of_a_number_of_steps_begin_with_a_round_of_their_own() -> None:
    sizes = [4, 5, 7, 6, 8, 9, 3, 12]
    sampler, cluster = identity_sampler(sizes, steps_per_epoch=9)
    assert len(sampler) == 9
    epochs = [epoch(sampler, number) for number in range(3)]
    assert {len(batches) for batches in epochs} == {9}
    assert epochs[0][:3] != epochs[1][:3] != epochs[2][:3]
    for batches in epochs:
        assert all(len({int(cluster[draw.index]) for draw in batch}) == 4 for batch in batches)
    again, _ = identity_sampler(sizes, steps_per_epoch=9)
    assert epoch(again, 2) == epochs[2]
    # the next round of an epoch is not the first round of the next epoch
    flat = [[[draw.index for draw in batch] for batch in batches] for batches in epochs]
    assert not any(batch in flat[1] for batch in flat[0][3:])


def test_few_identities_fill_the_steps_of_an_epoch() -> None:
    sampler, _ = identity_sampler([3, 3], steps_per_epoch=5)
    assert [len(batch) for batch in epoch(sampler, 0)] == [12] * 5
