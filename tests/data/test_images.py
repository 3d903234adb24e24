from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from reid.data import images
from reid.data.images import read_image, readable_kinds, why_not_read
from reid.file_kinds import HEAD, PICTURE_SUFFIXES, find_kind
from reid.structures import DataError


def noise(height: int = 40, width: int = 24) -> np.ndarray:
    """Smooth pixels with some noise: a real test for JPEG and resizing."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height))).astype(int)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("options", [
    {}, {"quality": 30}, {"progressive": True}, {"subsampling": 0}, {"optimize": True},
    {"comment": b"a comment"}, {"restart_marker_blocks": 2},
])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_as_pillow_decodes_it(tmp_path: Path, mode: str, options: dict) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(noise()).convert(mode).save(path, **options)
    pixels = read_image(str(path))
    assert pixels.flags.c_contiguous
    assert difference(pixels, np.asarray(Image.open(path).convert("RGB"))) == 0


def test_grey_palette_and_alpha_become_rgb(tmp_path: Path) -> None:
    colours = noise()
    path = str(tmp_path / "image.png")
    for mode in ("1", "L", "LA", "P", "RGBA"):
        image = Image.fromarray(colours).convert(mode)
        image.save(path)
        assert difference(read_image(path), np.asarray(image.convert("RGB"))) == 0
    hidden = np.dstack([colours, np.zeros(colours.shape[:2], np.uint8)])
    Image.fromarray(hidden).save(path)
    assert difference(read_image(path), colours) == 0
    palette = Image.fromarray(colours).convert("P")
    palette.save(path, transparency=bytes(range(256)))
    assert difference(read_image(path), np.asarray(palette.convert("RGB"))) == 0


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_upper_byte_of_16_bits(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    grey = noise()[:, :, 0]
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(path)
    assert difference(read_image(str(path)), np.repeat(grey[:, :, None], 3, 2)) == 0


def test_32_bits_have_no_known_range(tmp_path: Path) -> None:
    path = tmp_path / "float.tif"
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path)
    with pytest.raises(DataError, match=r"float\.tif: .*32 bits without a known range"):
        read_image(str(path))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees, clockwise
    pixels = noise()
    Image.fromarray(pixels).save(path, exif=exif)
    stored = np.asarray(Image.open(path).convert("RGB"))
    assert difference(read_image(str(path)), np.rot90(stored, -1)) == 0


@pytest.mark.parametrize("orientation", [None, 1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(
    tmp_path: Path, mode: str, orientation: int | None
) -> None:
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8))
    picture = smooth.resize((96, 200), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = str(tmp_path / "large.jpg")
    picture.save(path, quality=95, exif=exif)
    whole = read_image(path)
    upright = whole.shape[:2]
    assert upright == ((96, 200) if orientation == 6 else (200, 96))
    for scale in (1, 2, 4, 8):
        expected = tuple(side // scale for side in upright)
        found = read_image(path, least=expected)
        assert found.shape == (*expected, 3)
        other = Image.fromarray(whole).resize(expected[::-1], Image.Resampling.BOX)
        assert np.abs(found.astype(int) - np.asarray(other)).mean() < 3
    for least in ((upright[0] // 2 + 1, 8), (8, upright[1] // 2 + 1), upright, (999, 999)):
        assert np.array_equal(read_image(path, least=least), whole)
    picture.save(path, "MPO", save_all=True, append_images=[picture], quality=95, exif=exif)
    assert read_image(path, least=(8, 8)).shape == (*(side // 8 for side in upright), 3)
    picture.save(tmp_path / "large.png")
    assert read_image(str(tmp_path / "large.png"), least=(8, 8)).shape == (200, 96, 3)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (8, 16), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_image(str(path))[3, 3].tolist() == [255, 0, 0]


def test_every_cut_off_jpeg_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, "JPEG", quality=90)
    content = buffer.getvalue()
    for length in (0, 1, 2, 3, 4, 20, 160, 300, 600, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cut\.jpg: is not a readable image"):
            read_image(str(path))


def test_broken_jpeg_reads_as_pillow_reads_it_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, "JPEG", quality=60)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
        path.write_bytes(content)
        try:
            expected = np.asarray(Image.open(path).convert("RGB"))
        except (OSError, SyntaxError):
            with pytest.raises(DataError, match=r"broken\.jpg"):
                read_image(str(path))
            outcomes.add("refused")
        else:
            assert difference(read_image(str(path)), expected) == 0
            outcomes.add("read")
    assert outcomes == {"read", "refused"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [20_000, 59_999])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_decompression_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, limit: int
) -> None:
    path = tmp_path / f"bomb.{suffix}"
    Image.new("L", (200, 300)).save(path)
    assert read_image(str(path)).shape == (300, 200, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"bomb\.{suffix}: .*(decompression bomb|too many)"):
        read_image(str(path))


@pytest.mark.parametrize("head", [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBPVP8 "])
def test_a_file_too_large_to_be_a_picture_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(8 * 1000 + 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"large\.jpg: .*8,001 bytes are too many for a picture"):
        read_image(str(path))


def test_too_little_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr("PIL.Image.open", fail)
    with pytest.raises(DataError, match=r"x\.png: is not a readable image \(MemoryError\)"):
        read_image(str(tmp_path / "x.png"))


def test_files_that_are_not_images(tmp_path: Path) -> None:
    for content in (b"no image", b"\xff\xd8\xff\xe0cut", b"\x89PNG\r\n\x1a\nno"):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jpg: is not a readable image"):
            read_image(str(tmp_path / "x.jpg"))
    with pytest.raises(DataError, match=r"missing\.jpg: is not a readable image"):
        read_image(str(tmp_path / "missing.jpg"))
    with pytest.raises(DataError, match="is not a readable image"):
        read_image(str(tmp_path))


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.jpg"
    picture = Image.new("RGB", (8, 8))
    picture.save(path, "EPS")
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: ran.append(1) or picture.im)
    with pytest.raises(DataError, match="is not a readable image"):
        read_image(str(path))
    assert not ran


def encoded(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise()).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(("kind", "name", "options", "feature"), [
    ("JPEG", "a.jfif", {}, ""), ("JPEG", "a.png", {}, ""), ("PNG", "no_suffix", {}, ""),
    ("TIFF", "a.jpg", {}, ""), ("TIFF", "a.tif", {"big_tiff": True}, ""),
    ("TIFF", "a.tiff", {"compression": "tiff_adobe_deflate"}, "libtiff"), ("GIF", "a.gif", {}, ""),
    ("BMP", "a.dat", {}, ""), ("PPM", "a.bak", {}, ""), ("WEBP", "a.jpg", {"lossless": True}, ""),
    ("AVIF", "a.avif", {"quality": 100, "subsampling": "4:4:4"}, "avif"),
    ("JPEG2000", "a.jp2", {}, "jpg_2000"), ("JPEG2000", "a.j2k", {"no_jp2": True}, "jpg_2000"),
])  # fmt: skip
def test_pictures_are_read_by_what_they_hold(
    tmp_path: Path, kind: str, name: str, options: dict, feature: str
) -> None:
    if feature and not features.check(feature):
        pytest.skip(f"this Pillow has no {feature}")
    content = encoded(kind, **options)
    (tmp_path / name).write_bytes(content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert difference(read_image(str(tmp_path / name)), expected) == 0
    assert difference(expected, noise()) < (256 if kind in ("JPEG", "GIF", "AVIF") else 1)
    found = find_kind(content[:HEAD])
    assert found is not None
    assert found.name in readable_kinds()


def test_heic_is_read_with_its_package(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(noise())).save(tmp_path / "a.heic", quality=95)
    pixels = read_image(str(tmp_path / "a.heic"))
    assert np.abs(pixels.astype(int) - noise().astype(int)).mean() < 8
    assert why_not_read("HEIC") == ""


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99)


def test_a_package_or_a_feature_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    monkeypatch.setattr(features, "check", lambda name: name not in ("avif", "jpg_2000"))
    for cached in (images.readable_kinds, images._pillow_formats):
        cached.cache_clear()
        monkeypatch.setattr(images, cached.__name__, cached.__wrapped__)
    (tmp_path / "a.jpg").write_bytes(HEIC)
    with pytest.raises(
        DataError, match=r"a HEIC picture; to read HEIC: pip install 'reid\[heic\]'"
    ):
        read_image(str(tmp_path / "a.jpg"))
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x1cftypavif" + bytes(99))
    with pytest.raises(DataError, match="an AVIF picture; this Pillow was built without AVIF"):
        read_image(str(tmp_path / "a.jpg"))
    Image.fromarray(noise()).save(tmp_path / "a.png")
    assert difference(read_image(str(tmp_path / "a.png")), noise()) == 0


@pytest.mark.parametrize(("content", "message"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "run `git lfs pull`"),
    (b"../.git/annex/objects/aa/bb/key", "run `git annex get` on it"),
    (b"outs:\n- md5: 0\n  path: a.jpg\n", "run `dvc pull` on it"),
    (b"<!DOCTYPE html>\n<html>", "it is a web page, not the file that its address promised"),
    (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>', "the error message of a server"),
    (b"", r"empty \(0 bytes\); a copy or download failed"),
    (b"PK\3\4" + bytes(99), "it is a zip archive; unpack it"),
    (b"8BPS\0\1" + bytes(99), "it is a PSD picture; convert to JPEG or PNG"),
    (b"\0\0\0\x18ftypmp42" + bytes(99), "it is a video"),
    (b'<svg xmlns="x">', "it is an SVG picture; convert to JPEG or PNG"),
])  # fmt: skip
def test_errors_name_the_kind_of_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg: is not a readable image \(.*{message}"):
        read_image(str(tmp_path / "a.jpg"))


def test_the_preview_of_a_raw_file_is_not_read(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.nef", "TIFF")
    with pytest.raises(DataError, match=r"it is camera raw; convert to JPEG or PNG"):
        read_image(str(tmp_path / "a.nef"))


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    for name, kind in (("a", "pipe"), ("b", "pipe"), ("c", "device")):
        with pytest.raises(DataError, match=rf"{name}\.jpg: is not .* \(is a {kind}, expected a"):
            read_image(str(tmp_path / f"{name}.jpg"))


def test_suffixes_of_pictures_are_of_kinds_that_are_known() -> None:
    assert {"JPEG", "TIFF", "GIF", "AVIF", "JPEG 2000", "HEIC"} <= {*PICTURE_SUFFIXES.values()}
    assert {*images._FORMATS} <= {*PICTURE_SUFFIXES.values()}
    assert PICTURE_SUFFIXES[".jfif"] == "JPEG"
