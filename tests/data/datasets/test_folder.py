from __future__ import annotations

from pathlib import Path

import pytest

from reid.data.datasets import Folder
from reid.structures import DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    return tmp_path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_camera_a_folder(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    touch(root / "own", "cam10/a.jpg", "cam2/day 1/b.png", "cam2/c.jpg", "cam1/ü.jpg", "cam1/x.txt")
    (root / "own" / "empty").mkdir()
    dataset = Folder("own")
    records = dataset.load("train")
    places = [(Path(r.path).relative_to(root / "own").as_posix(), r.camid) for r in records]
    assert places == [("cam1/ü.jpg", 0), ("cam10/a.jpg", 2), ("cam2/c.jpg", 1),
                      ("cam2/day 1/b.png", 1)]  # fmt: skip
    assert {record.pid for record in records} == {-1}
    assert dataset.cameras == ("cam1", "cam2", "cam10")
    assert dataset.name == "own"
    assert "own: cameras 0 = 'cam1', 1 = 'cam2', 2 = 'cam10'" in caplog.text
    assert "passed over files that are no images: 1" in caplog.text


def test_one_image_of_one_camera(root: Path) -> None:
    touch(root / "own", "door/1.jpg")
    assert [record.camid for record in Folder("own").load("train")] == [0]


def test_a_flat_folder_is_of_unknown_cameras(root: Path) -> None:
    touch(root / "own", "1.jpg", "2.jpg")
    dataset = Folder("own")
    assert [record.camid for record in dataset.load("train")] == [-1, -1]
    assert dataset.cameras == ()


def test_what_does_not_work_says_why(root: Path) -> None:
    touch(root / "own", "door/1.jpg", "2.jpg")
    with pytest.raises(DataError, match=r"1 images lie beside the cameras' folders.*'2\.jpg'"):
        Folder("own").load("train")
    assert not Folder("own").has_test()
    with pytest.raises(DataError, match="has no identities, so there is no query; for a test use"):
        Folder("own").load("query")
    with pytest.raises(DataError, match=r"(?s)there is no folder .*gone.*a folder for each camera"):
        Folder("gone").load("train")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image found"):
        Folder("empty").load("train")
