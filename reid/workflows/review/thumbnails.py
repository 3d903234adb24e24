"""Thumbnails of the images, made at the first request and then stored."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from reid.data.images import read_image
from reid.files import InputError, OutputError, read_bytes, replacing
from reid.structures import DataError

SIZE = (192, 384)
"""Most pixels of width and height."""
_QUALITY = 88
_MOST_BYTES = 2**22
_GREY = (128, 134, 142)


class Thumbnails:
    """JPEG files of images by their number.

    Args:
        paths: Of the images.
        folder: Where the files are kept; made when the first one is.
    """

    def __init__(self, paths: Sequence[str], folder: Path) -> None:
        self._paths = paths
        self._folder = folder

    def get(self, number: int) -> bytes:
        """The picture as JPEG; of an image that cannot be read, a crossed box.

        Raises:
            IndexError: There is no image of this number.
        """
        if not 0 <= number < len(self._paths):
            raise IndexError(number)
        path = self._paths[number]
        place = self._place(path)
        if place is not None and place.is_file():
            try:
                return bytes(read_bytes(place, _MOST_BYTES, "thumbnail"))
            except InputError:
                pass  # it is made again below
        try:
            picture = Image.fromarray(read_image(path))
        except DataError:
            return _encode(_crossed())
        picture.thumbnail(SIZE, Image.Resampling.LANCZOS)
        data = _encode(picture)
        if place is not None:
            self._keep(place, data)
        return data

    def _place(self, path: str) -> Path | None:
        """The file for an image as it is now: another content has another name."""
        try:
            found = os.stat(path)  # noqa: PTH116
        except (OSError, ValueError):
            return None
        key = f"{os.path.abspath(path)}\0{found.st_size}\0{found.st_mtime_ns}\0{SIZE}"  # noqa: PTH100
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._folder / name[:2] / f"{name}.jpg"

    def _keep(self, place: Path, data: bytes) -> None:
        """Stores a thumbnail; on a full disk it is not stored but made again next time."""
        try:
            with replacing(place) as temporary:
                temporary.write_bytes(data)
        except OutputError:
            return


def _encode(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=_QUALITY)
    return data.getvalue()


def _crossed() -> Image.Image:
    picture = Image.new("RGB", (96, 192), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 95, 191), outline=_GREY, width=3)
    draw.line((0, 0, 95, 191), fill=_GREY, width=3)
    draw.line((0, 191, 95, 0), fill=_GREY, width=3)
    return picture
