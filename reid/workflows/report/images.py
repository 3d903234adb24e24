"""Pictures inside a page: small JPEGs as data URIs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from reid.data.images import read_image
from reid.structures import DataError

_THUMBNAIL = (64, 128)  # width and height in pixels, at most
_SHEET_WIDTH = 1400
_SMALLEST_WIDTH = 480  # of a sheet; below, nothing in it can be told apart
_SHEET_HEIGHT = 16_000
_QUALITY = 80


class PictureBudget:
    """Encodes pictures until a budget of bytes is spent.

    Args:
        size: Bytes that all data URIs together may have.

    Attributes:
        left: Remaining bytes.
        unread: Path and reason of each image that could not be read.
        left_out: Number of pictures that did not fit into the budget.
    """

    def __init__(self, size: int) -> None:
        self.left = size
        self.unread: dict[str, str] = {}
        self.left_out = 0

    def thumbnail(self, path: str) -> Markup | None:
        """A thumbnail of an image; None: the image is unreadable or does not fit the budget."""
        image = self._read(path)
        if image is None:
            return None
        image.thumbnail(_THUMBNAIL, Image.Resampling.BICUBIC)
        return self._take(_jpeg(image), self.left)

    def sheet(self, path: Path, most: int) -> Markup | None:
        """A sheet, as large as the budget allows; None: it is unreadable or does not fit.

        Args:
            path: The PNG file.
            most: Bytes that the sheet may have.
        """
        image = self._read(str(path))
        if image is None:
            return None
        most = min(most, self.left)
        scale = min(1.0, _SHEET_WIDTH / image.width, _SHEET_HEIGHT / image.height)
        smallest = min(scale, _SMALLEST_WIDTH / image.width)
        while True:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            uri = _jpeg(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0))
            if len(uri) <= most or scale == smallest:
                return self._take(uri, most)
            # The bytes of a JPEG grow a little slower than its pixels.
            scale = max(smallest, 0.9 * scale * (most / len(uri)) ** 0.5)

    def _read(self, path: str) -> Image.Image | None:
        if path in self.unread:
            return None
        try:
            # Reading a pipe could block, and a device may have no end.
            if not Path(path).is_file():
                raise DataError(f"{path}: there is no such file")
            return Image.fromarray(read_image(path))
        except (DataError, OSError, ValueError) as error:  # ValueError: a name with a NUL
            self.unread[path] = str(error)
            return None

    def _take(self, uri: str, most: int) -> Markup | None:
        if len(uri) > most:
            self.left_out += 1
            return None
        self.left -= len(uri)
        return Markup(uri)


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
