from __future__ import annotations

import numpy as np
import pytest
import torch

from reid.evaluation.ranking_kernels import is_junk
from reid.evaluation.relevance import Counts, Relevance
from reid.structures import FeatureSet, ImageRecord


def images(*rows: tuple[int, int], name: str = "image") -> list[ImageRecord]:
    """Images of (pid, camid)."""
    return [ImageRecord(f"{name}{i}.jpg", *row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("pid", "camid", "other_pid", "other_camid", "junk"),
    [
        (1, 0, 1, 0, True),
        (1, 0, 1, 1, False),
        (1, 0, 2, 0, False),
        (1, -1, 1, -1, False),
        (1, 0, 1, -1, False),
        (1, 0, -1, 3, True),
        (-1, 0, -1, 1, True),
        (-1, 0, 2, 0, False),
    ],
)
def test_junk(pid: int, camid: int, other_pid: int, other_camid: int, junk: bool) -> None:
    assert is_junk(pid, camid, other_pid, other_camid) == junk
    found = Relevance.of_records(images((pid, camid), name="q"), images((other_pid, other_camid)))
    assert found.junk_of(0).tolist() == [junk]
    assert (found.verdicts(0, [0]) == ["junk"]) == junk
    matches = int(not junk and pid == other_pid)
    assert found.matches().tolist() == [matches]


def test_different_spellings_of_a_path_are_one_image() -> None:
    query = [ImageRecord("a/../b.jpg", 1), ImageRecord("c.jpg", 2), ImageRecord("d.jpg", 1)]
    gallery = [ImageRecord(path, 1) for path in ("b.jpg", "e.jpg", "b.jpg", "./c.jpg")]
    found = Relevance.of_records(query, gallery)
    assert [found.images_of_itself(row).tolist() for row in range(3)] == [[0, 2], [3], []]
    assert found.verdicts(0, [3, 2, 1, 0]) == ["same", "junk", "same", "junk"]
    assert found.verdicts(1, [3, 0]) == ["junk", "other"]
    assert found.matches().tolist() == [2, 0, 4]
    some = found.within(np.array([1, 2, 3]))
    assert [some.images_of_itself(row).tolist() for row in range(3)] == [[1], [2], []]
    assert some.matches().tolist() == [2, 0, 3]


def test_features_and_records_give_the_same_relevance() -> None:
    rng = np.random.default_rng(0)
    rows = [(int(pid), int(camid)) for pid, camid in rng.integers(-1, 4, (60, 2))]
    records = images(*rows)
    sets = FeatureSet.of(
        torch.zeros(60, 1), torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    )
    paths = [record.path for record in records]
    one = Relevance.of_records(records[:20], records[10:])
    other = Relevance.of(sets[:20], sets[10:], paths[:20], paths[10:])
    for name in Relevance.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    expected = [
        sum(
            g.pid == q.pid != -1 and not (g.camid == q.camid != -1) and g.path != q.path
            for g in records[10:]
        )
        for q in records[:20]
    ]
    assert one.matches().tolist() == expected


def test_counts() -> None:
    query = images((1, 0), (2, 0), (-1, 0), name="q")
    gallery = images((1, 1), (2, 0), (-1, 0), (7, 1), (8, 1))
    counts = Relevance.of_records(query, gallery).counts()
    assert counts == Counts(queries=3, with_match=1, gallery=5, junk=1, distractors=2)
    assert counts.ignored == 2
    assert counts.as_dict() == {
        "queries": {"all": 3, "with_match": 1, "ignored": 2},
        "gallery": {"all": 5, "junk": 1, "distractors": 2},
    }
    assert counts.text() == (
        "3 queries: 1 with a match, 2 ignored; 5 gallery images: 1 junk, 2 distractors"
    )


@pytest.mark.parametrize(
    ("query", "gallery", "reason"),
    [
        (images(), images((1, 0)), "there are 0 queries and 1 gallery images"),
        (images((-1, 0)), images((1, 1)), "none of 1 queries has an identity"),
        (images((1, 0)), images((-1, 1)), "none of 1 gallery images has an identity"),
        (
            images((1, 0)),
            images((2, 1)),
            "none of 1 gallery images has the identity of one of 1 queries; the pids of query and",
        ),
        (
            images((1, 3), (2, 3), name="q"),
            images((1, 3), (2, 3)),
            "all images are of camera 3, and an image of the query's own camera is no match; leave "
            "camid empty if cameras do not matter",
        ),
        (
            images((1, 0), (2, 1), name="q"),
            images((1, 0), (2, 1)),
            "every gallery image of a query's identity is of the query's own camera, and an image",
        ),
        (
            images((1, -1)),
            images((1, -1)),
            "the only gallery image of a query's identity is the query itself",
        ),
    ],
)
def test_why_no_query_has_a_match(
    query: list[ImageRecord], gallery: list[ImageRecord], reason: str
) -> None:
    found = Relevance.of_records(query, gallery)
    assert not found.counts().with_match
    assert found.why_no_match().startswith(reason)
