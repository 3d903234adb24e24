"""Tiles of images with frames, marks and captions, from which pictures are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from reid.data import images
from reid.files import replacing

Colour = tuple[int, int, int]
Mark = Literal["", "tick", "cross", "dash"]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

WHITE: Colour = (255, 255, 255)
INK: Colour = (45, 50, 58)
GREEN: Colour = (34, 160, 84)
RED: Colour = (212, 56, 56)
GREY: Colour = (150, 154, 160)
# Okabe and Ito's colours, distinguishable with any colour vision
PALETTE: tuple[Colour, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (90, 90, 90),
)
IMAGE = (96, 192)  # width, height in pixels
FRAME = 6
GAP = 10
MARGIN = 24
CELL = (IMAGE[0] + 2 * FRAME, IMAGE[1] + 2 * FRAME)


@dataclass(frozen=True)
class Style:
    """The frame of a tile; colour and mark say the same.

    Attributes:
        text: Text in the legend.
        colour: Colour of the frame.
        mark: Mark in the tile's corner; a `dash` makes the frame dashed and the image pale.
    """

    text: str
    colour: Colour
    mark: Mark = ""


@lru_cache
def font(size: int = 18) -> Font:
    """Pillow's default font."""
    return ImageFont.load_default(size=size)


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture, and an object to draw on it."""
    picture = Image.new("RGB", (width, height), WHITE)
    return picture, ImageDraw.Draw(picture)


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def read_image(name: str, size: tuple[int, int] = IMAGE) -> Image.Image:
    """An image, resized to (width, height) pixels.

    Raises:
        DataError: The image cannot be read.
    """
    return Image.fromarray(images.read_image(name)).resize(size, Image.Resampling.BICUBIC)


def paste_tile(picture: Image.Image, name: str, corner: tuple[int, int], style: Style) -> None:
    """Draws an image in its frame.

    Args:
        picture: The picture to draw on.
        name: Path of the image.
        corner: Left and top of the frame; see `CELL` for its size.
        style: Style of the frame.

    Raises:
        DataError: The image cannot be read.
    """
    small = read_image(name)
    draw = ImageDraw.Draw(picture)
    left, top = corner
    box = (left, top, left + CELL[0] - 1, top + CELL[1] - 1)
    if style.mark == "dash":
        small = Image.blend(small, Image.new("RGB", IMAGE, WHITE), 0.45)
        _dashed(draw, box, style.colour)
    else:
        draw.rectangle(box, outline=style.colour, width=FRAME)
    picture.paste(small, (left + FRAME, top + FRAME))
    if style.mark in ("tick", "cross"):
        draw_mark(draw, (box[2] - 13, top + 13), style)


def draw_mark(draw: ImageDraw.ImageDraw, middle: tuple[int, int], style: Style) -> None:
    """Draws a tick or a cross on a disc of the style's colour; a short dash for `dash`."""
    x, y = middle
    if style.mark == "dash":
        draw.line((x - 9, y, x - 3, y), fill=style.colour, width=4)
        draw.line((x + 3, y, x + 9, y), fill=style.colour, width=4)
        return
    draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=style.colour, outline=WHITE, width=2)
    if style.mark == "tick":
        draw.line((x - 6, y, x - 2, y + 5, x + 6, y - 5), fill=WHITE, width=3, joint="curve")
    elif style.mark == "cross":
        draw.line((x - 5, y - 5, x + 5, y + 5), fill=WHITE, width=3)
        draw.line((x - 5, y + 5, x + 5, y - 5), fill=WHITE, width=3)


def draw_legend(draw: ImageDraw.ImageDraw, left: int, middle: int, styles: Sequence[Style]) -> int:
    """Draws the legend of some styles, side by side; returns the x where the last one ends."""
    for style in styles:
        if style.mark:
            draw_mark(draw, (left + 12, middle), style)
        else:
            draw.rectangle((left, middle - 9, left + 24, middle + 9), outline=style.colour, width=5)
        draw.text((left + 32, middle), style.text, fill=INK, font=font(), anchor="lm")
        left += 32 + text_width(style.text) + 28
    return left


def text_width(text: str, size: int = 18) -> int:
    """Width in pixels."""
    return round(font(size).getlength(text))


def shortened(text: str, width: int, size: int = 18) -> str:
    """The text, cut at the end if it is wider than `width` pixels."""
    if text_width(text, size) <= width:
        return text
    kept = text
    while kept and text_width(f"{kept}…", size) > width:
        kept = kept[:-1]
    return f"{kept}…"


def _dashed(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour) -> None:
    left, top, right, bottom = box
    step = 12
    for x in range(left, right, 2 * step):
        end = min(x + step, right)
        draw.rectangle((x, top, end, top + FRAME - 1), fill=colour)
        draw.rectangle((x, bottom - FRAME + 1, end, bottom), fill=colour)
    for y in range(top, bottom, 2 * step):
        end = min(y + step, bottom)
        draw.rectangle((left, y, left + FRAME - 1, end), fill=colour)
        draw.rectangle((right - FRAME + 1, y, right, end), fill=colour)
