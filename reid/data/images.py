"""Reads pictures from disk."""

from __future__ import annotations

import io
import logging
import re
import struct
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torchvision.io import ImageReadMode, decode_jpeg

from reid.data.decoders import listen
from reid.data.resize import Pixels
from reid.file_kinds import HEAD, PICTURE_SUFFIXES, find_kind
from reid.files import InputError, read_bytes
from reid.structures import DataError

logger = logging.getLogger(__name__)

Decoding = Literal["exact", "reduced"]

# What Pillow's decoders raise on broken files.
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError,
    struct.error, Image.DecompressionBombError, MemoryError,
)  # fmt: skip
_BYTES_PER_PIXEL = 8  # four channels of 16 bits, not compressed
# Pillow's name of each kind, and the feature of Pillow or the package that it needs. Pillow reads
# more kinds, but would have Ghostscript run a PostScript file, whatever the file's name.

_FORMATS = {
    "JPEG": ("JPEG", "jpg"),
    "PNG": ("PNG", "zlib"),
    "BMP": ("BMP", ""),
    "GIF": ("GIF", ""),
    "TIFF": ("TIFF", ""),
    "WebP": ("WEBP", "webp"),
    "PPM": ("PPM", ""),
    "JPEG 2000": ("JPEG2000", "jpg_2000"),
    "AVIF": ("AVIF", "avif"),
    "HEIC": ("HEIF", "pillow_heif"),
}
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive JPEG
_LARGEST_SHORT = 0xFFFF
_MOST_SCANS = 100  # of a JPEG file; writers of progressive ones make about ten
_SCAN, _END, _NO_SEGMENT = b"\xff\xda", b"\xff\xd9", b"\xff\x01"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not those inside a scan
_ORIENTATION, _ON_THE_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF
_MOST_TOLD = 5  # complaints that a process logs


def read_image(
    path: str, data: bytearray | None = None, least: tuple[int, int] | None = None
) -> Pixels:
    """An image file as RGB pixels (height, width, 3).

    Grey becomes three equal channels; of 16-bit grey the upper byte counts, as Pillow does with
    16-bit colours. Palettes and CMYK are converted. Alpha is dropped, so hidden pixels become
    visible. An EXIF orientation is applied, so that persons stand as a viewer shows them (most code
    of the field ignores it; the published data sets have none). An animation gives its first frame.

    JPEG, PNG, BMP, GIF, TIFF, WebP, PPM, JPEG 2000 and AVIF files are read, and HEIC files with
    `pillow-heif`, whatever their names. torchvision reads plain JPEG files, with the same
    pixels as Pillow in less time; Pillow reads the others. If a decoder reads a picture but
    complains, the log says so, with the path.

    Args:
        path: The file.
        data: Its bytes, if they are at hand (`read_encoded`).
        least: (H, W) that are enough: a JPEG file of at least twice as many rows and columns is
            decoded at a half, a quarter or an eighth of its size, in a fraction of the time. None:
            all pixels are wanted.

    Raises:
        DataError: The file is missing, is not a regular file, is cut off, or of none of these
            kinds. Or it is too large: more pixels than Pillow's limit against decompression bombs,
            more than 8 bytes for each of these pixels, or a JPEG file with more than 100 scans,
            each of which takes the time of a whole picture. Or there is too little memory.
    """
    pixels, complaint = read_image_noting(path, data, least)
    if complaint:
        _tell(path, complaint)
    return pixels


def read_encoded(path: str) -> bytearray:
    """The bytes of an image file, which are not decoded.

    Raises:
        DataError: The file is missing, is not a regular file, or is too large for a picture.
    """
    try:
        return read_bytes(path, _BYTES_PER_PIXEL * _largest(), "picture")
    except InputError as error:
        raise _unreadable(path, error) from error


def read_image_noting(
    path: str, data: bytearray | None = None, least: tuple[int, int] | None = None
) -> tuple[Pixels, str]:
    """The pixels as `read_image` gives them, and the decoder's complaint, or an empty string.

    Raises:
        DataError: The image cannot be read; see `read_image`.
    """
    if data is None:
        data = read_encoded(path)
    try:
        _check_scans(data)
        size = _plain_jpeg_size(data)
        if size is not None and not (least and _is_reducible(size, least)):
            try:
                encoded = torch.frombuffer(data, dtype=torch.uint8)
                image, complaint = listen(lambda: decode_jpeg(encoded, ImageReadMode.UNCHANGED))
            except RuntimeError:
                pass  # Pillow decides
            else:
                return _rgb(image.permute(1, 2, 0).numpy()), complaint
        return listen(lambda: _read_with_pillow(data, path, least))
    except _BROKEN as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).removeprefix(f"{path}: ")
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
        reason = "its content is no picture of a kind that is read"
    return DataError(f"{path}: is not a readable image ({reason})")


def why_not_read(kind: str) -> str:
    """Why pictures of a kind (`FileKind.name`) are not read, and what to do; empty: they are."""
    if kind not in _FORMATS:
        return "convert to JPEG or PNG"
    if kind in readable_kinds():
        return ""
    if kind == "HEIC":
        return "to read HEIC: pip install 'reid[heic]'"
    return f"this Pillow was built without {kind}; update Pillow, or convert to JPEG or PNG"


@cache
def readable_kinds() -> frozenset[str]:
    """The kinds of pictures (`FileKind.name`) that are read here."""
    return frozenset(kind for kind, (_, needs) in _FORMATS.items() if not needs or _is_there(needs))


def _is_there(needs: str) -> bool:
    if needs == "pillow_heif":
        return find_spec(needs) is not None
    return bool(features.check(needs))


@cache
def _pillow_formats() -> tuple[str, ...]:
    """Pillow's names of the kinds that are read; registers the kinds of other packages with it."""
    if "HEIC" in readable_kinds():
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(_FORMATS[kind][0] for kind in _FORMATS if kind in readable_kinds())


def _tell(path: str, complaint: str) -> None:
    """Logs a complaint; a process logs at most `_MOST_TOLD`."""
    _told.append(path)
    if len(_told) <= _MOST_TOLD:
        more = "; further complaints of decoders are not shown" * (len(_told) == _MOST_TOLD)
        logger.warning("%s: is read, but its decoder complains (%s)%s", path, complaint, more)


_told: list[str] = []


def _read_with_pillow(data: bytearray, path: str, least: tuple[int, int] | None) -> Pixels:
    kind = find_kind(bytes(data[:HEAD]))
    name = "" if kind is None else kind.name
    if PICTURE_SUFFIXES.get(Path(path).suffix.lower()) == "camera raw" and name == "TIFF":
        name = "camera raw"  # read as TIFF, it would give its preview only
    if kind is not None and why_not_read(name):
        advice = why_not_read(name) if kind.group == "picture" else kind.advice
        phrase = kind.phrase if name == kind.name else name
        raise ValueError(f"it is {phrase}; {advice}" if advice else f"it is {phrase}")
    with Image.open(io.BytesIO(data), formats=_pillow_formats()) as image:
        # Pillow itself refuses pictures only from twice its limit on.
        if image.width * image.height > _largest():
            raise ValueError(f"{image.width} x {image.height} pixels are too many for a picture")
        if least and image.format in ("JPEG", "MPO"):  # MPO: with further pictures, as of phones
            turned = image.getexif().get(_ORIENTATION, 1) in _ON_THE_SIDE
            height, width = least[::-1] if turned else least
            image.draft(image.mode, (width, height))  # the smallest size that is not below
        return picture_pixels(image)


def picture_pixels(image: Image.Image) -> Pixels:
    """A picture that Pillow has opened as RGB pixels; see `read_image`.

    Raises:
        ValueError: The range of its pixels is not known.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format in ("PNG", "PPM")):
        return _rgb((np.asarray(upright).astype(np.int64) >> 8).astype(np.uint8)[:, :, None])
    if upright.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits without a known range; expected 8 or 16")
    if "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return np.array(upright.convert("RGB"))


def _rgb(pixels: Pixels) -> Pixels:
    """Contiguous pixels of three channels."""
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    return np.ascontiguousarray(pixels)


def _largest() -> int:
    """Pixels of the largest picture."""
    return Image.MAX_IMAGE_PIXELS or _LARGEST_SHORT**2


def _check_scans(data: bytearray) -> None:
    """Refuses a JPEG file of more scans than a writer makes.

    Raises:
        ValueError: It has more than `_MOST_SCANS`.
    """
    # This count settles nearly all files; it is too high if a thumbnail or a profile holds bytes
    # that look like a scan.
    if data[:2] != b"\xff\xd8" or data.count(_SCAN) <= _MOST_SCANS:
        return
    at, scans = 2, 0
    # Like libjpeg, skip any bytes between two segments.
    while (marker := _MARKER.search(data, at)) and marker[0] != _END:
        length = data[marker.end() : marker.end() + 2]
        at = marker.end() + (int.from_bytes(length, "big") if marker[0] != _NO_SEGMENT else 0)
        scans += marker[0] == _SCAN
        if scans > _MOST_SCANS:
            raise ValueError(
                f"it has more than {_MOST_SCANS} scans, and each takes the time of a whole "
                "picture; save it anew"
            )


def _is_reducible(size: tuple[int, int], least: tuple[int, int]) -> bool:
    """Whether half of a picture's rows and columns are still enough."""
    return size[0] >= 2 * least[0] and size[1] >= 2 * least[1]


def _plain_jpeg_size(data: bytearray) -> tuple[int, int] | None:
    """(height, width) of a grey or colour JPEG of a usual size, without EXIF data; None: it is not.

    Reads the segments before the picture's data, so that the size is known before decoding.
    """
    limit = _largest()
    at, end = 2, len(data) - 10
    if end < at or data[0] != 0xFF or data[1] != 0xD8:
        return None
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _PLAIN_FRAMES:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            usual = data[at + 4] == 8 and data[at + 9] in (1, 3) and 0 < height * width <= limit
            return (height, width) if usual else None
        if not (0xE0 <= marker <= 0xFE or marker in (0xC4, 0xDB, 0xDD)) or marker == 0xE1:
            return None  # EXIF (E1), a rare kind of JPEG, or not one at all
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None
