"""Pictures on disk."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from reid.data.resize import Pixels
from reid.structures import DataError

# What Pillow's decoders raise on broken files.
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError,
    struct.error, Image.DecompressionBombError, MemoryError,
)  # fmt: skip
_BYTES_PER_PIXEL = 8  # four channels of 16 bits, not compressed
# Pillow reads more, but would hand PostScript, whatever its file is called, to Ghostscript to run.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive JPEG
_LARGEST_SHORT = 0xFFFF


def read_image(path: str) -> Pixels:
    """An image file as RGB pixels (height, width, 3).

    Grey becomes three equal channels; of 16-bit grey the upper byte counts, as Pillow does with
    16-bit colours. Palettes and CMYK are converted. Alpha is dropped: what it hides is seen. An
    EXIF orientation is applied, so that persons stand as a viewer shows them (most code of the
    field ignores it; the published data sets have none). Of an animation the first frame is taken.
    JPEG, PNG, BMP, GIF, TIFF, WebP and PPM files are read, whatever they are called; plain JPEG
    ones by torchvision, which gives Pillow's pixels in less time, the others by Pillow.

    Raises:
        DataError: The file is missing, cut off, is of none of these formats, or is too large to
            be a picture: above Pillow's limit of pixels, against decompression bombs, or with more
            than 8 bytes for each of these. Or memory does not suffice.
    """
    try:
        data = _read(path)
        if _is_plain_jpeg(data):
            try:
                encoded = torch.frombuffer(data, dtype=torch.uint8)
                image = decode_jpeg(encoded, ImageReadMode.UNCHANGED)
            except RuntimeError:
                pass  # Pillow has the last word
            else:
                return _rgb(image.permute(1, 2, 0).numpy())
        return _read_with_pillow(path)
    except _BROKEN as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: is not a readable image ({reason})") from error


def _read(path: str) -> bytearray:
    """A file that has no more bytes than a picture can have."""
    with Path(path).open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _BYTES_PER_PIXEL * _largest():
            raise ValueError(f"{size:,} bytes are too many for a picture")
        data = bytearray(size)
        del data[file.readinto(data) :]
    return data


def _read_with_pillow(path: str) -> Pixels:
    with Image.open(path, formats=_FORMATS) as image:
        # Pillow itself refuses only what is two times above its limit.
        if image.width * image.height > _largest():
            raise ValueError(f"{image.width} x {image.height} pixels are too many for a picture")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") or (
            upright.mode == "I" and image.format in ("PNG", "PPM")
        ):
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
