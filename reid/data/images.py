"""Pictures on disk."""

from __future__ import annotations

import io
import logging
import re
import struct
from functools import cache
from importlib.util import find_spec
from pathlib import Path

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

# What Pillow's decoders raise on broken files.
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError,
    struct.error, Image.DecompressionBombError, MemoryError,
)  # fmt: skip
_BYTES_PER_PIXEL = 8  # four channels of 16 bits, not compressed
# Pillow's name, and its feature or the package that brings it. Pillow reads more kinds, but would
# hand PostScript, whatever its file is called, to Ghostscript to run.
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
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # but for those inside a scan
_MOST_TOLD = 5  # complaints of decoders that a process tells


def read_image(path: str) -> Pixels:
    """An image file as RGB pixels (height, width, 3).

    Grey becomes three equal channels; of 16-bit grey the upper byte counts, as Pillow does with
    16-bit colours. Palettes and CMYK are converted. Alpha is dropped: what it hides is seen. An
    EXIF orientation is applied, so that persons stand as a viewer shows them (most code of the
    field ignores it; the published data sets have none). Of an animation the first frame is taken.

    JPEG, PNG, BMP, GIF, TIFF, WebP, PPM, JPEG 2000 and AVIF files are read, and HEIC files with
    `pillow-heif`, all by what they hold and whatever they are called; plain JPEG ones by
    torchvision, which gives Pillow's pixels in less time, the others by Pillow. A picture that a
    decoder reads but complains of is told in the log, with its path.

    Raises:
        DataError: The file is missing, no regular file (it is not waited for), cut off, is of none
            of these kinds, or is too large to be a picture: above Pillow's limit of pixels, against
            decompression bombs, with more than 8 bytes for each of these, or a JPEG file of more
            than 100 scans, each of which takes the time of a whole picture. Or memory does not
            suffice.
    """
    pixels, complaint = read_image_noting(path)
    if complaint:
        _tell(path, complaint)
    return pixels


def read_image_noting(path: str) -> tuple[Pixels, str]:
    """What `read_image` gives, and what the decoder complained of; empty: of nothing.

    Raises:
        DataError: See `read_image`.
    """
    try:
        data = read_bytes(path, _BYTES_PER_PIXEL * _largest(), "picture")
        _check_scans(data)
        if _is_plain_jpeg(data):
            try:
                encoded = torch.frombuffer(data, dtype=torch.uint8)
                image, complaint = listen(lambda: decode_jpeg(encoded, ImageReadMode.UNCHANGED))
            except RuntimeError:
                pass  # Pillow has the last word
            else:
                return _rgb(image.permute(1, 2, 0).numpy()), complaint
        return listen(lambda: _read_with_pillow(data, path))
    except _BROKEN as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, InputError):
            reason = reason.removeprefix(f"{path}: ")
        if isinstance(error, UnidentifiedImageError):  # names an object in memory
            reason = "its content is no picture of a kind that is read"
        raise DataError(f"{path}: is not a readable image ({reason})") from error


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
    """Pillow's names of the kinds that are read; those of other packages are made known to it."""
    if "HEIC" in readable_kinds():
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(_FORMATS[kind][0] for kind in _FORMATS if kind in readable_kinds())


def _tell(path: str, complaint: str) -> None:
    """Logs a complaint; after `_MOST_TOLD` of them the process is silent."""
    _told.append(path)
    if len(_told) <= _MOST_TOLD:
        more = "; further complaints of decoders are not shown" * (len(_told) == _MOST_TOLD)
        logger.warning("%s: is read, but its decoder complains (%s)%s", path, complaint, more)


_told: list[str] = []


def _read_with_pillow(data: bytearray, path: str) -> Pixels:
    kind = find_kind(bytes(data[:HEAD]))
    name = "" if kind is None else kind.name
    if PICTURE_SUFFIXES.get(Path(path).suffix.lower()) == "camera raw" and name == "TIFF":
        name = "camera raw"  # as TIFF only the preview in it would be read
    if kind is not None and why_not_read(name):
        advice = why_not_read(name) if kind.group == "picture" else kind.advice
        raise ValueError(f"it is {kind.phrase if name == kind.name else name}; {advice}")
    with Image.open(io.BytesIO(data), formats=_pillow_formats()) as image:
        # Pillow itself refuses only what is two times above its limit.
        if image.width * image.height > _largest():
            raise ValueError(f"{image.width} x {image.height} pixels are too many for a picture")
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
    # Nearly all files are settled by the first line: what looks like a scan may also stand in a
    # thumbnail or in a profile.
    if data[:2] != b"\xff\xd8" or data.count(_SCAN) <= _MOST_SCANS:
        return
    at, scans = 2, 0
    # Like libjpeg this passes over whatever stands between two segments.
    while (marker := _MARKER.search(data, at)) and marker[0] != _END:
        length = data[marker.end() : marker.end() + 2]
        at = marker.end() + (int.from_bytes(length, "big") if marker[0] != _NO_SEGMENT else 0)
        scans += marker[0] == _SCAN
        if scans > _MOST_SCANS:
            raise ValueError(
                f"it has more than {_MOST_SCANS} scans, and each takes the time of a whole "
                "picture; save it anew"
            )


def _is_plain_jpeg(data: bytearray) -> bool:
    """Whether this is a grey or colour JPEG of a usual size, without EXIF data.

    Looks through the segments in front of the picture, so that nothing is decoded whose size is
    not known.
    """
    limit = _largest()
    at, end = 2, len(data) - 10
    if end < at or data[0] != 0xFF or data[1] != 0xD8:
        return False
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _PLAIN_FRAMES:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return data[at + 4] == 8 and data[at + 9] in (1, 3) and 0 < height * width <= limit
        if not (0xE0 <= marker <= 0xFE or marker in (0xC4, 0xDB, 0xDD)) or marker == 0xE1:
            return False  # EXIF (E1), a rare kind of JPEG, or not one at all
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False
