"""Validation splits: which images they take, and which stay in training."""

from __future__ import annotations

import re
from collections import Counter
from hashlib import sha256

import pytest

from reid.data.checks import check_labels
from reid.data.datasets.base import ReIDDataset, Split, SplitCounts
from reid.data.datasets.validation import ValidationSplit
from reid.structures import DataError, ImageRecord

Seen = dict[int, dict[int, int]]
"""Identity -> camera -> number of images."""


class Listed(ReIDDataset):
    """A training set with the given numbers of images."""

    name = "Listed"
    cameras = ("door", "hall")

    def __init__(self, seen: Seen, unlabelled: int = 0) -> None:
        super().__init__("somewhere")
        self.records = [
            ImageRecord(f"{self.root}/{pid:04d}_c{camid}_{number}.jpg", pid, camid)
            for pid, cameras in seen.items()
            for camid, count in cameras.items()
            for number in range(count)
        ]
        self.records += [ImageRecord(f"{self.root}/x{n}.jpg", -1, 0) for n in range(unlabelled)]

    def load(self, split: Split) -> list[ImageRecord]:
        assert split == "train"
        return self.records

    def has_test(self) -> bool:
        return False

    def published(self) -> dict[Split, SplitCounts]:
        return {"train": SplitCounts(images=1)}


def splits(dataset: ReIDDataset) -> dict[Split, list[ImageRecord]]:
    return {split: dataset.load(split) for split in ("train", "query", "gallery")}


def many(identities: int = 40) -> Seen:
    return {pid: {c: 2 + (pid + c) % 3 for c in range(2 + pid % 4)} for pid in range(identities)}


def test_each_identity_and_camera_has_one_query() -> None:
    source = Listed(many(), unlabelled=7)
    found = splits(ValidationSplit(source, 10))
    taken = {record.pid for record in found["query"]}
    assert len(taken) == 10
    assert {record.pid for record in found["gallery"]} == taken
    assert not taken & {record.pid for record in found["train"]}
    assert Counter(record.pid for record in found["train"])[-1] == 7
    pairs = Counter((record.pid, record.camid) for record in found["query"])
    assert set(pairs.values()) == {1}
    assert pairs.keys() == {(r.pid, r.camid) for r in source.records if r.pid in taken}
    everything = [*found["train"], *found["query"], *found["gallery"]]
    assert sorted(r.path for r in everything) == sorted(r.path for r in source.records)
    for part in found.values():  # in the order of the dataset
        assert part == [record for record in source.records if record in part]
    assert not check_labels(found)


def test_the_choice_depends_on_the_seed_alone() -> None:
    source = Listed(many())
    first = splits(ValidationSplit(source, 10, seed=1))
    again = Listed(many())
    again.records.reverse()
    shuffled = splits(ValidationSplit(again, 10, seed=1))
    assert {split: sorted(r.path for r in part) for split, part in first.items()} == {
        split: sorted(r.path for r in part) for split, part in shuffled.items()
    }
    other = splits(ValidationSplit(source, 10, seed=2))
    assert {r.pid for r in other["query"]} != {r.pid for r in first["query"]}
    # more of them hold the fewer
    more = splits(ValidationSplit(source, 11))
    assert {r.pid for r in first["query"]} < {r.pid for r in more["query"]}
    # the name must tell splits apart, whatever the version
    order = sorted(many(), key=lambda pid: sha256(f"1/{pid}".encode()).digest())
    assert {r.pid for r in first["query"]} == set(order[:10])


@pytest.mark.parametrize(
    ("cameras", "queries", "gallery"),
    [
        ({0: 3, 1: 2}, {0, 1}, [0, 0, 1]),
        ({0: 2, 1: 2, 2: 1}, {0, 1, 2}, [0, 1]),
        ({0: 4, 1: 1}, {0}, [0, 0, 0, 1]),  # else the query of camera 0 has no match
        ({0: 1, 1: 1}, None, None),
        (dict.fromkeys(range(20), 1), None, None),
        ({-1: 2}, {-1}, [-1]),
        ({-1: 1, 0: 1}, None, None),
        ({-1: 3, 4: 1}, {-1, 4}, [-1, -1]),
    ],
)
def test_every_query_has_a_match(
    cameras: dict[int, int], queries: set[int] | None, gallery: list[int] | None
) -> None:
    for seed in range(5):
        found = splits(ValidationSplit(Listed({7: cameras, 8: {0: 1}}), 1, seed))
        assert [record.pid for record in found["train"]] == [8]
        assert not check_labels({"query": found["query"], "gallery": found["gallery"]})
        asked = {record.camid for record in found["query"]}
        if queries is None:
            assert len(found["query"]) == len(cameras) // 2
            assert len(found["gallery"]) == -(-len(cameras) // 2)
        else:
            assert asked == queries
            assert sorted(record.camid for record in found["gallery"]) == gallery


def test_a_share_counts_identities_that_can_be_queries(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    seen = many(20) | {pid: {0: 5} for pid in range(100, 130)} | {200: {-1: 1}}
    dataset = ValidationSplit(Listed(seen, unlabelled=3), 0.25, seed=4)
    assert len({record.pid for record in dataset.load("query")}) == 5
    assert {record.pid for record in dataset.load("train")} >= {*range(100, 130), 200, -1}
    dataset.load("gallery")
    told = re.findall(
        r"Listed: 5 of 51 identities are set aside for validation \(seed 4\): (\d+) queries, (\d+) "
        r"gallery images\. That costs training (\d+) of its (\d+) images \((.+) %\)",
        caplog.text,
    )
    assert len(told) == 1
    queries, gallery, cost, total = map(int, told[0][:4])
    assert (queries, gallery) == (len(dataset.load("query")), len(dataset.load("gallery")))
    assert cost == queries + gallery == total - len(dataset.load("train"))
    assert float(told[0][4]) == round(100 * cost / total, 1)
    assert len({r.pid for r in ValidationSplit(Listed(many(20)), 0.001).load("query")}) == 1


def test_name_site_and_splits() -> None:
    dataset = ValidationSplit(Listed(many()), 0.2, seed=3)
    assert dataset.name == "Listed-validation-0.2-seed3"
    assert (dataset.site, dataset.cameras) == ("Listed", ("door", "hall"))
    assert dataset.is_validation
    assert dataset.has_train()
    assert dataset.has_test()
    assert not dataset.published()


@pytest.mark.parametrize("identities", [0, -1, 0.0, 1.0, 2.5])
def test_wrong_numbers_of_identities(identities: float) -> None:
    with pytest.raises(ValueError, match=r"validation\.identities: expected a number"):
        ValidationSplit(Listed(many()), identities)


def test_too_few_identities() -> None:
    with pytest.raises(
        DataError, match=r"needs 3 identities .* only 2 of the 3 training identities"
    ):
        ValidationSplit(Listed({1: {0: 2, 1: 2}, 2: {0: 1, 1: 1}, 3: {0: 9}}), 3).load("train")
    with pytest.raises(DataError, match="leaves none to train on"):
        ValidationSplit(Listed({1: {0: 2, 1: 2}}), 1).load("train")
    with pytest.raises(DataError, match="only 0 of the 0 training identities"):
        ValidationSplit(Listed({}, unlabelled=5), 0.5).load("train")


def test_a_file_that_is_listed_twice() -> None:
    source = Listed({1: {0: 2, 1: 2}, 2: {0: 2, 1: 2}})
    source.records += source.records[:1]
    found = splits(ValidationSplit(source, 1))
    assert sum(map(len, found.values())) == 9
    assert not {r.pid for r in found["train"]} & {r.pid for r in found["query"]}
