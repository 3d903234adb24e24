from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

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


def test_each_folder_is_a_camera(root: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_errors_say_why(root: Path) -> None:
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


def test_a_camera_of_another_suffix_is_read(root: Path) -> None:
    for name in ("a/1.jfif", "b/2.jpg", "c/3"):
        (root / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16)).save(root / "own" / name, "JPEG")
    dataset = Folder("own")
    assert [record.camid for record in dataset.load("train")] == [0, 1, 2]
    assert dataset.cameras == ("a", "b", "c")


def test_a_camera_that_vanishes_is_an_error(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(root / "own", "a/1.jxl", "a/2.jxl", "b/3.jpg", "b/4.jxl")
    with pytest.raises(
        DataError,
        match=r"own: camera 'a' has no image that is read, but 2 JPEG XL pictures, the first is "
        r"'a/1\.jxl'; convert to JPEG or PNG, or move them out of the data",
    ):
        Folder("own").load("train")
    touch(root / "own", "a/5.jpg")
    assert len(Folder("own").load("train")) == 2
    assert "JPEG XL pictures, which are not read (convert to JPEG or PNG): 3 (" in caplog.text


def test_folders_without_images_are_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(root / "own", "a/1.jpg", "videos/1.mp4", "labels/1.txt")
    (root / "own" / "empty").mkdir()
    (root / "own" / "again").symlink_to(root / "own" / "a")
    assert Folder("own").load("train")
    assert "an image, which are no cameras: 'empty', 'labels', 'videos'" in caplog.text


def test_a_folder_of_other_files_says_what_it_has(root: Path) -> None:
    touch(root / "own", "1.psd", "2.mp4")
    with pytest.raises(DataError, match=r"no image found but PSD pictures.*: 1 \('1.psd'\), files"):
        Folder("own").load("train")
