from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from reid.data import scan as module
from reid.data.scan import scan_folder, scan_images
from reid.files import InputError
from reid.structures import DataError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="makes symbolic links")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def settle(folder: Path) -> None:
    """Makes all folders old enough to be trusted."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            os.utime(path, ns=(10**18, 10**18))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "CACHED_FROM", 1)
    # Setting a folder's times changes its ctime to now, so no folder would count as old.
    monkeypatch.setattr(module, "_SETTLED", 0)
    return tmp_path / "cache" / "reid"


def test_names_of_all_kinds(tmp_path: Path) -> None:
    names = ["a b/ü ñ.PNG", "cam/1/2/3.jpeg", "人/猫.webp", "x#1.bmp", "%s.jpg"]
    touch(tmp_path, *names, "notes.txt", ".hidden.jpg", ".thumbnails/1.jpg", "no_suffix")
    (tmp_path / os.fsdecode(b"latin-\xe9.jpg")).touch()
    scan = scan_images(tmp_path)
    assert scan.images == sorted([*names, os.fsdecode(b"latin-\xe9.jpg")])
    assert scan.others == {".txt": 1, "without a suffix": 1}
    assert scan.hidden == 2
    assert scan.passed_over() == (
        "files that are no images: 2 (.txt 1, without a suffix 1), hidden files or folders: 2"
    )


def picture(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 16)).save(path, kind)


def test_content_decides_for_unknown_suffixes(tmp_path: Path) -> None:
    for name, kind in (("a", "JPEG"), ("b.JPG_original", "JPEG"), ("c.bak", "PNG")):
        picture(tmp_path / name, kind)
    touch(tmp_path, "d.jfif", "e.TIFF", "f.gif", "g.x", "h.txt", "i.mp4", "j.x", "empty")
    (tmp_path / "h.txt").write_bytes((tmp_path / "a").read_bytes())  # never opened
    (tmp_path / "raw").write_bytes(b"8BPS\0\1" + bytes(20))
    for name in ("k.psd", "l.JXL", "m.jxl", "n.nef"):
        touch(tmp_path, name)
    (tmp_path / "page").write_bytes(b"<!DOCTYPE html>")
    scan = scan_images(tmp_path)
    assert scan.images == ["a", "b.JPG_original", "c.bak", "d.jfif", "e.TIFF", "f.gif"]
    assert scan.unread == {
        "PSD": ["k.psd", "raw"], "JPEG XL": ["l.JXL", "m.jxl"], "camera raw": ["n.nef"],
    }  # fmt: skip
    assert scan.others == {".x": 2, ".txt": 1, ".mp4": 1, "without a suffix": 2}
    text = scan.passed_over()
    assert "JPEG XL pictures, which are not read (convert to JPEG or PNG): 2 ('l.JXL', 'm" in text
    assert "files that are no images: 6 (.x 2, without a suffix 2, .mp4 1, ...)" in text
    assert scan_folder(tmp_path).images == scan.images
    assert scan_folder(tmp_path).unread == scan.unread
    assert scan_folder(tmp_path).others == scan.others


def test_only_files_of_unknown_suffix_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, *(f"{i}{suffix}" for i in range(9) for suffix in (".jpg", ".txt", ".heic")))
    touch(tmp_path, "1.thing", "2")
    opened: list[str] = []
    real = module.kind_of_file
    monkeypatch.setattr(module, "kind_of_file", lambda path: (opened.append(path), real(path))[1])
    scan_images(tmp_path)
    scan_folder(tmp_path)
    assert sorted(Path(path).name for path in opened) == ["1.thing", "1.thing", "2", "2"]


def test_a_file_that_may_not_be_read_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "1.jpg", "secret")

    def refuse(path: str) -> None:
        raise InputError(f"{path}: cannot be read (Permission denied)")

    monkeypatch.setattr(module, "kind_of_file", refuse)
    assert scan_images(tmp_path).others == {"cannot be read": 1}


def test_pipes_and_devices_are_named_and_not_opened(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    os.mkfifo(tmp_path / "a" / "2.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    scan = scan_images(tmp_path)
    assert scan.images == ["a/1.jpg"]
    assert scan.odd == ["pipe", "zero.png", "a/2.jpg"]
    assert "pipes, sockets or devices: 3 ('pipe', 'zero.png', 'a/2.jpg')" in scan.passed_over()
    assert scan_folder(tmp_path / "a").images == ["1.jpg", "2.jpg"]  # an error only when it is read
    assert scan_folder(tmp_path).others == {}


def test_folders_with_files_of_unknown_suffix_are_read_again(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "root"
    touch(root, "1.jpg", "named/2.jpg", "later")
    assert scan_images(root).images == ["1.jpg", "named/2.jpg"]
    with (root / "later").open("wb") as file:  # changes no time of the folder
        Image.new("RGB", (8, 16)).save(file, "PNG")
    assert scan_images(root).images == ["1.jpg", "later", "named/2.jpg"]


def test_a_change_of_readable_kinds_makes_the_cache_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    touch(root, "1.jpg", "2.jxl")
    scan_images(root)
    kinds = module.readable_kinds()
    monkeypatch.setattr(module, "readable_kinds", lambda: kinds | {"JPEG XL"})
    assert scan_images(root).images == ["1.jpg", "2.jxl"]


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "b/1.jpg", "b/deep/2.jpg")
    touch(tmp_path, "elsewhere/3.jpg", "elsewhere/c/4.jpg")
    (root / "a").symlink_to(root / "b")  # sorted before b, but b is read as the real folder
    (root / "b" / "up").symlink_to(root)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "d").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "c")
    (root / "5.jpg").symlink_to(root / "b" / "1.jpg")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    scan = scan_images(root)
    assert scan.images == ["5.jpg", "b/1.jpg", "b/deep/2.jpg", "c/3.jpg", "c/c/4.jpg"]
    assert scan.dangling == ["gone.jpg", "self.jpg"]
    assert sorted(scan.repeated) == ["a", "b/up", "c/back", "d"]
    assert "links that lead nowhere: 2" in scan.passed_over()


def test_what_cannot_be_read_stops(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: there is no such folder"):
        scan_images(tmp_path / "gone")
    touch(tmp_path, "a/b/1.jpg")
    (tmp_path / "a" / "b").chmod(0)
    try:
        if os.access(tmp_path / "a" / "b", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(DataError, match=r"a/b: cannot be read \(Permission denied\)"):
            scan_images(tmp_path)
    finally:
        (tmp_path / "a" / "b").chmod(0o755)


def test_a_folder_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); make it readable"):
        scan_images(tmp_path)


def test_only_changed_folders_are_read_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    touch(root, "a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    first = scan_images(root)
    assert len(list(cache.iterdir())) == 1
    read: list[str] = []
    real = module._read_folder

    def spy(path: Path, stamp: list[int]) -> object:
        read.append(path.relative_to(root).as_posix())
        return real(path, stamp)

    monkeypatch.setattr(module, "_read_folder", spy)
    assert scan_images(root) == first
    assert read == []
    for change, folders in (
        (lambda: touch(root, "a/deep/4.jpg"), ["a/deep"]),
        (lambda: (root / "a/deep/4.jpg").rename(root / "a/deep/5.jpg"), ["a/deep"]),
        (lambda: (root / "a/1.jpg").unlink(), ["a"]),
        (lambda: touch(root, "b/new/6.jpg"), ["b", "b/new"]),
        (lambda: shutil.rmtree(root / "b/new"), ["b"]),
        (lambda: (root / "a/deep").rename(root / "deep"), [".", "a", "deep"]),
    ):
        change()
        read.clear()
        found = scan_images(root).images
        assert read == folders
        assert found == sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))


def test_swapped_folders_with_equal_times_are_told_apart(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "root"
    touch(root, "a/1.jpg", "b/2.jpg")
    settle(root)
    assert scan_images(root).images == ["a/1.jpg", "b/2.jpg"]
    (root / "a").rename(root / "c")
    (root / "b").rename(root / "a")
    (root / "c").rename(root / "b")
    settle(root)
    assert scan_images(root).images == ["a/2.jpg", "b/1.jpg"]


def test_a_link_whose_target_comes_and_goes(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "root"
    touch(root, "1.jpg")
    touch(tmp_path, "far/2.jpg")
    (root / "2.jpg").symlink_to(tmp_path / "far" / "2.jpg")
    assert scan_images(root).images == ["1.jpg", "2.jpg"]
    (tmp_path / "far" / "2.jpg").unlink()
    assert scan_images(root).dangling == ["2.jpg"]
    touch(tmp_path, "far/2.jpg")
    assert scan_images(root).images == ["1.jpg", "2.jpg"]


def test_a_young_folder_is_not_trusted(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED", 10**12)
    root = tmp_path / "root"
    touch(root, "1.jpg", "a/2.jpg")
    scan_images(root)
    (file,) = cache.iterdir()
    folders = json.loads(file.read_text())["folders"]
    assert {name: entry[0] for name, entry in folders.items()} == {"": [], "a": []}  # no stamps


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "folders": {"": [1]}}', "null"])
def test_a_broken_cache_is_made_anew(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    root = tmp_path / "root"
    touch(root, "1.jpg")
    first = scan_images(root)
    (file,) = cache.iterdir()
    good = file.read_text()
    file.write_text(text)
    assert scan_images(root) == first
    assert file.read_text() == good
    if text != '{"format": 1, "folders": {"": [1]}}':
        assert "the folder is read anew" in caplog.text


def test_a_small_tree_and_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "root/1.jpg", "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scan_images(tmp_path / "root")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(module, "CACHED_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert scan_images(tmp_path / "root").images == ["1.jpg"]
    assert "cannot be written" in caplog.text
