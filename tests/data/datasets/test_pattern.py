from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reid.data.datasets import Pattern
from reid.registry import DATASET, ConfigError, build
from reid.structures import DataError, ImageRecord

MARKET = r"(?P<pid>-1|\d+)_c(?P<camid>\d+)"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    return tmp_path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def ids(records: list[ImageRecord]) -> list[tuple[str, int, int]]:
    return [(Path(record.path).name, record.pid, record.camid) for record in records]


def test_numbers_stay_identities_and_cameras_count_from_0(root: Path) -> None:
    touch(root / "own", "a/0002_c10s1.jpg", "a/0700_c2s1.jpg", "b/-1_c2s1.jpg")
    dataset = Pattern("own", MARKET)
    assert ids(dataset.load("train")) == [
        ("0002_c10s1.jpg", 2, 1), ("0700_c2s1.jpg", 700, 0), ("-1_c2s1.jpg", -1, 0)]  # fmt: skip
    assert dataset.cameras == ("2", "10")
    assert dataset.identities == {}
    assert not dataset.has_test()
    with pytest.raises(DataError, match=r"no image of the split 'query'.*gives: train; it has no"):
        dataset.load("query")


def test_names_are_numbered_in_natural_order(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    touch(root / "own", "Zoë/hall/1.jpg", "p10/hall/1.jpg", "p2/door/1.jpg", "-1/door/2.jpg")
    dataset = Pattern("own", r"^(?P<pid>[^/]+)/(?P<camid>[^/]+)/(?P<shot>\d+)\.jpg$")
    records = dataset.load("train")
    assert [record.pid for record in records] == [-1, 2, 1, 0]  # -1, Zoë, p10, p2
    assert [record.camid for record in records] == [0, 1, 1, 0]
    assert dataset.identities == {0: "p2", 1: "p10", 2: "Zoë"}
    assert records[0].extra == {"camera": "door", "shot": "2"}
    assert "PATTERN matches 4 of 4 images" in caplog.text
    assert "'p2/door/1.jpg'" in caplog.text
    assert "cameras: 0 = 'door', 1 = 'hall'" in caplog.text


def test_long_numbers_are_names(root: Path) -> None:
    touch(root / "own", "20240131120000123456789.jpg", "5.jpg")
    dataset = Pattern("own", r"(?P<pid>\d+)")
    assert [record.pid for record in dataset.load("train")] == [1, 0]
    assert dataset.identities == {0: "5", 1: "20240131120000123456789"}


def test_splits(root: Path) -> None:
    touch(root / "own", "train/1_c1.jpg", "probe/2_c1.jpg", "test/2_c3.jpg")
    pattern = rf"^(?P<split>\w+)/{MARKET}"
    dataset = Pattern("own", pattern, splits={"query": "probe", "gallery": "test"})
    assert dataset.has_test()
    assert [ids(dataset.load(split)) for split in ("train", "query", "gallery")] == [
        [("1_c1.jpg", 1, 0)], [("2_c1.jpg", 2, 0)], [("2_c3.jpg", 2, 1)]]  # fmt: skip
    with pytest.raises(DataError, match=r"2 of 3 images do not match .* or name no split of train"):
        Pattern("own", pattern).load("train")


def test_optional_groups(root: Path) -> None:
    touch(root / "own", "1.jpg", "x_c4.jpg")
    dataset = Pattern("own", r"^(?P<pid>\d+)?.*?(_c(?P<camid>\d))?\.jpg$")
    assert ids(dataset.load("train")) == [("1.jpg", 1, -1), ("x_c4.jpg", -1, 0)]
    assert [record.extra for record in dataset.load("train")] == [{}, {"camera": "4"}]
    assert ids(Pattern("own", r"jpg$").load("train")) == [("1.jpg", -1, -1), ("x_c4.jpg", -1, -1)]


def test_unmatched_images(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(root / "own", "1_c1.jpg", "holiday.jpg", "party.jpg")
    with pytest.raises(
        DataError, match=r"2 of 3 images do not match .* first are 'holiday.jpg', 'party.jpg'.*skip"
    ):
        Pattern("own", MARKET).load("train")
    assert len(Pattern("own", MARKET, unmatched="skip").load("train")) == 1
    assert "own: passed over 2 images that do not match PATTERN, the first are" in caplog.text
    (root / "own" / "1_c1.jpg").unlink()
    with pytest.raises(DataError, match="2 of 2 images do not match"):
        Pattern("own", MARKET, unmatched="skip").load("train")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image found"):
        Pattern("empty", MARKET).load("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "(?P<pid>"}, r"datasets\.train \(Pattern\): pattern: .* is no regular expr"),
        ({"pattern": r"(?P<camera>\d)"}, "pattern: group 'camera': did you mean 'camid'"),
        ({"pattern": r"(?P<PID>\d)"}, "pattern: group 'PID': did you mean 'pid'"),
        ({"pattern": "1", "splits": {"query": "q"}}, r"splits: .* a group \(\?P<split>"),
        ({"pattern": "(?P<split>1)", "splits": {"test": "q"}}, "splits: expected train, query"),
        ({"pattern": "(?P<split>1)", "splits": {"query": "train"}}, "another word for each"),
        ({"pattern": "1", "unmatched": "ignore"}, r"datasets\.train\.unmatched: expected one of"),
    ],
)
def test_wrong_options_name_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DATASET, {"name": "Pattern", "path": "own", **options}, "datasets.train")


def test_a_camera_that_vanishes_is_an_error(root: Path) -> None:
    touch(root / "own", "1_c1.jpg", "1_c2.jxl", "2_c2.jxl", "other.psd")
    with pytest.raises(DataError, match="camera '2' has no image that is read, but 2 JPEG XL pict"):
        Pattern("own", MARKET).load("train")
    touch(root / "own", "1_c2.jpg")
    assert Pattern("own", MARKET).cameras == ()
    assert len(Pattern("own", MARKET).load("train")) == 2


def test_a_group_of_viewpoints(root: Path) -> None:
    touch(root / "cars", "1_c1_v3.jpg", "1_c2_v.jpg")
    pattern = MARKET + r"_v(?P<view>\w*)"
    records = Pattern("cars", pattern).load("train")
    assert [record.extra["view"] for record in records] == [3, -1]
    touch(root / "cars", "1_c3_vfront.jpg")
    with pytest.raises(DataError, match="the group view is 'front'; expected a viewpoint"):
        Pattern("cars", pattern).load("train")
