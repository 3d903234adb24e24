from __future__ import annotations

import multiprocessing
import os
import struct
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid.data import images
from reid.data.decoders import listen
from reid.data.images import read_image, read_image_noting


def jpeg(path: Path, junk: bytes = b"") -> Path:
    """A JPEG file with extra bytes before its end, which libjpeg skips and complains of."""
    pixels = np.random.default_rng(0).integers(0, 255, (96, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    content = path.read_bytes()
    path.write_bytes(content[:-2] + junk + content[-2:])
    return path


def tiff(path: Path) -> Path:
    """A TIFF file with a tag beyond the file's end, which Pillow warns of."""
    Image.new("RGB", (8, 16), (10, 20, 30)).save(path, "TIFF", software="x" * 20)
    content = bytearray(path.read_bytes())
    tag = content.index(struct.pack("<HH", 305, 2))
    content[tag + 8 : tag + 12] = struct.pack("<I", len(content) + 1000)
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_told", [])


def test_complaints_name_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, odd = jpeg(tmp_path / "whole.jpg"), jpeg(tmp_path / "odd.jpg", b"\0\0\x12\x34")
    pixels = read_image(str(whole))
    assert (read_image(str(odd)) == pixels).all()
    read_image(str(tiff(tmp_path / "odd.tif")))
    first, second = caplog.messages
    assert first.startswith(f"{odd}: is read, but its decoder complains (Corrupt JPEG data: ")
    assert "extraneous bytes before marker" in first
    assert second.startswith(f"{tmp_path / 'odd.tif'}: is read, but its decoder complains (")
    assert capfd.readouterr() == ("", "")


def test_only_a_few_complaints_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = jpeg(tmp_path / "odd.jpg", b"\0\0\x12\x34")
    for _ in range(8):
        read_image(str(odd))
    assert len(caplog.messages) == 5
    assert caplog.messages[-1].endswith("further complaints of decoders are not shown")


def test_complaints_belong_to_their_thread(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [jpeg(tmp_path / f"{i}.jpg", b"\0\0\x12\x34" if i % 7 == 3 else b"") for i in range(60)]
    heard: dict[str, str] = {}

    def read(part: list[Path]) -> None:
        for path in part:
            heard[path.name] = read_image_noting(str(path))[1]

    threads = [threading.Thread(target=read, args=(paths[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name for name, text in heard.items() if text} == {
        f"{i}.jpg" for i in range(60) if i % 7 == 3
    }
    assert all(text.count("Corrupt") == 1 for text in heard.values() if text)
    assert capfd.readouterr().err == ""


def test_one_of_two_that_decode_at_once_has_complained() -> None:
    both, done = threading.Barrier(2, timeout=20), threading.Event()
    found: dict[str, str] = {}

    def decode(name: str, noise: bytes) -> str:
        if not done.is_set():  # the first time, both at once
            both.wait()
            os.write(2, noise)
            both.wait()
            done.set()
        else:
            os.write(2, noise)
        return name

    def run(name: str, noise: bytes) -> None:
        assert listen(lambda: decode(name, noise))[0] == name
        found[name] = listen(lambda: decode(name, noise))[1]

    threads = [
        threading.Thread(target=run, args=pair) for pair in (("loud", b"noise\n"), ("quiet", b""))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"loud": "noise", "quiet": ""}


def test_text_of_other_threads_passes(capfd: pytest.CaptureFixture[str]) -> None:
    assert listen(lambda: os.write(2, b"\r 50%|#### |"))[1] == ""  # another thread's bar
    assert capfd.readouterr().err == "\r 50%|#### |"
    with pytest.warns(UserWarning, match="of another part"):
        assert listen(lambda: warnings.warn("of another part", stacklevel=1))[1] == ""


def test_a_process_that_is_made_meanwhile_has_its_own_standard_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    inside, made = threading.Event(), threading.Event()

    def decode() -> None:
        inside.set()
        made.wait(20)

    thread = threading.Thread(target=lambda: listen(decode))
    thread.start()
    inside.wait(20)

    def child() -> None:
        os.write(2, b"from the child\n")
        assert listen(lambda: os.write(2, b"complaint"))[1] == "complaint"

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    made.set()
    thread.join()
    process.join()
    assert process.exitcode == 0
    assert capfd.readouterr().err == "from the child\n"


def test_an_error_of_a_decoder_passes_and_all_is_as_before(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        listen(fail)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
    assert listen(lambda: 3) == (3, "")


def progressive(path: Path, scans: int, between: bytes = b"") -> Path:
    """A progressive JPEG file whose last scan is repeated many times."""
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", progressive=True)
    content = path.read_bytes()
    last = content.rindex(b"\xff\xda")
    own = content.count(b"\xff\xda")
    again = between + content[last:-2]
    path.write_bytes(content[:-2] + again * (scans - own) + content[-2:])
    return path


@pytest.mark.parametrize("between", [b"", b"\0\0garbage", b"\xff\xff"])
def test_scans_are_counted_first(tmp_path: Path, between: bytes) -> None:
    path = progressive(tmp_path / "many.jpg", 101, between)
    with pytest.raises(images.DataError, match=r"many\.jpg: is not .* more than 100 scans"):
        read_image(str(path))
    assert read_image(str(progressive(path, 100, between))).shape == (32, 16, 3)


def test_bytes_like_scans_outside_the_picture_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "thumbnails.jpg"
    Image.new("RGB", (16, 32), (90, 30, 200)).save(path, comment=b"\xff\xda" * 500)
    assert read_image(str(path)).shape == (32, 16, 3)
    path.write_bytes(path.read_bytes() + b"\xff\xda\0\2" * 500)  # behind the end
    assert read_image(str(path)).shape == (32, 16, 3)


def test_a_file_of_nothing_but_scans_is_refused_fast(tmp_path: Path) -> None:
    path = progressive(tmp_path / "many.jpg", 20_000)
    started = time.perf_counter()
    with pytest.raises(images.DataError):
        read_image(str(path))
    assert time.perf_counter() - started < 5
