from __future__ import annotations

import logging

import pytest

from reid.evaluation.extract import ImageSet
from reid.evaluation.query_gallery import QueryGallery, check_query_gallery, usable_test_sets
from reid.structures import DataError, ImageRecord


def make_set(name: str, *cameras: int) -> QueryGallery:
    """Ten queries of camera 0, and a gallery image of each identity in these cameras."""
    query = [ImageRecord(f"{name}/q{i}.jpg", i, 0) for i in range(10)]
    gallery = [ImageRecord(f"{name}/g{i}.jpg", i, camid) for i, camid in enumerate(cameras)]
    return QueryGallery(name, query, gallery, ImageSet(name, [*query, *gallery], []))


GOOD = make_set("good", *[1] * 10)
ONE_MATCH = make_set("one", 0, 1, *[0] * 8)
NO_MATCH = make_set("none", *[0] * 10)


def test_ignored_queries_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert usable_test_sets([GOOD]) == [GOOD]
        assert not caplog.messages
        assert usable_test_sets([GOOD, ONE_MATCH]) == [GOOD, ONE_MATCH]
    assert caplog.messages == [
        "one: 9 of 10 queries have no match in another camera and count nowhere"
    ]


def test_one_query_without_cameras(caplog: pytest.LogCaptureFixture) -> None:
    query = [ImageRecord("a.jpg", 1), ImageRecord("b.jpg", 2)]
    with caplog.at_level(logging.WARNING):
        assert not check_query_gallery("own", query, [ImageRecord("c.jpg", 2)])
    assert caplog.messages == ["own: 1 of 2 queries has no match and counts nowhere"]


def test_a_set_that_cannot_be_scored_is_left_out_beside_a_good_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert usable_test_sets([NO_MATCH, GOOD]) == [GOOD]
    (message,) = caplog.messages
    assert message == (
        "none: no query has a match: all images are of camera 0, and an image of the query's own "
        "camera is no match; leave camid empty if cameras do not matter. This test set is left out"
    )


def test_no_usable_test_set_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^none: no query has a match: all images are of camera 0"):
        usable_test_sets([NO_MATCH])
    other = make_set("other", *[0] * 10)
    with pytest.raises(DataError, match=r"^none: .*; other: no query has a match"):
        usable_test_sets([NO_MATCH, other])
    assert usable_test_sets([]) == []
