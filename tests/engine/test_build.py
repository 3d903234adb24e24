"""What the builder logs."""

from __future__ import annotations

import logging

import pytest

from reid.engine.build import log_dataset
from reid.engine.testing import TestSet
from reid.structures import ImageRecord

TRAIN = [ImageRecord("a.jpg", 1, 0), ImageRecord("b.jpg", 1, 1), ImageRecord("c.jpg", 4, 1)]
QUERY, GALLERY = [ImageRecord("d.jpg", 9, -1)], [ImageRecord("e.jpg", -1, -1)]


def table(caplog: pytest.LogCaptureFixture) -> list[list[str]]:
    return [line.split() for line in caplog.messages[-1].splitlines()[1:]]


def test_the_table_counts_and_names_the_version(caplog: pytest.LogCaptureFixture) -> None:
    test_set = TestSet("Other", QUERY, GALLERY, [])
    with caplog.at_level(logging.INFO):
        log_dataset("MSMT17", TRAIN, [test_set], "MSMT17_V1")
    header, _, *rows = table(caplog)
    assert header == ["dataset", "split", "images", "identities", "cameras", "version"]
    assert rows == [
        ["MSMT17", "train", "3", "2", "2", "MSMT17_V1"],
        ["Other", "query", "1", "1", "unknown"],
        ["Other", "gallery", "1", "unlabelled", "unknown"],
    ]


def test_no_column_for_versions_where_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_dataset("Own", TRAIN, [])
    assert table(caplog)[0] == ["dataset", "split", "images", "identities", "cameras"]
