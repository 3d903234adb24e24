"""A picture of searches: each query with what was found for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from reid.pictures import canvas
from reid.pictures.canvas import CELL, FRAME, GAP, GREEN, GREY, IMAGE, INK, MARGIN, Style
from reid.structures import DataError

_QUERY = Style("query", INK)
_SAME = Style("counts as the same person", GREEN, "tick")
_OTHER = Style("does not", GREY)
_PLAIN = Style("found", GREY)
_HEADER, _BAND, _LEGEND, _QUERY_GAP = 34, 42, 46, 30


class Tile(NamedTuple):
    """An image that was found.

    Attributes:
        path: Of the image.
        lines: Two short lines of text to stand below it.
        same: Whether it counts as the same person; None: nobody knows.
    """

    path: str
    lines: tuple[str, str]
    same: bool | None


def draw_answers(
    path: Path, queries: Sequence[tuple[str, str]], answers: Sequence[Sequence[Tile]]
) -> None:
    """Draws one row per query: the query, then what was found, best first.

    A file that cannot be read any more leaves an empty tile that says so: a gallery outlives the
    images that it was made of.

    Args:
        path: The PNG to write, whole or not at all.
        queries: Q pairs of path and a line of text.
        answers: For each query the images found. Rows may differ in length.

    Raises:
        ValueError: There is no query, or not one row of answers for each.
    """
    if not queries or len(queries) != len(answers):
        raise ValueError(
            f"expected one query or more and as many rows of answers, got {len(queries)} and "
            f"{len(answers)}"
        )
    columns = max(len(row) for row in answers)
    styles = {_style(tile) for row in answers for tile in row}
    legend = [_QUERY, *(style for style in (_SAME, _OTHER, _PLAIN) if style in styles)]
    lefts = [MARGIN, *(MARGIN + CELL[0] + _QUERY_GAP + i * (CELL[0] + GAP) for i in range(columns))]
    line_height = CELL[1] + _BAND + GAP
    legend_width = sum(60 + canvas.text_width(style.text) for style in legend)
    width = max(lefts[-1] + CELL[0] + MARGIN, 2 * MARGIN + legend_width)
    height = 2 * MARGIN + _HEADER + len(queries) * line_height + _LEGEND
    picture, draw = canvas.canvas(width, height)
    for place, left in enumerate(lefts):
        middle = (left + CELL[0] // 2, MARGIN + _HEADER // 2 - 4)
        title = str(place) if place else "query"
        draw.text(middle, title, fill=INK, font=canvas.font(), anchor="mm")
    for number, ((name, text), row) in enumerate(zip(queries, answers, strict=True)):
        top = MARGIN + _HEADER + number * line_height
        _paste(picture, draw, name, (lefts[0], top), _QUERY, (text, ""))
        for left, tile in zip(lefts[1:], row, strict=False):
            _paste(picture, draw, tile.path, (left, top), _style(tile), tile.lines)
    canvas.draw_legend(draw, MARGIN, height - MARGIN - _LEGEND // 2 + 8, legend)
    canvas.save(picture, path)


def _style(tile: Tile) -> Style:
    return {True: _SAME, False: _OTHER, None: _PLAIN}[tile.same]


def _paste(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    name: str,
    corner: tuple[int, int],
    style: Style,
    lines: tuple[str, str],
) -> None:
    left, top = corner
    try:
        canvas.paste_tile(picture, name, corner, style)
    except DataError:
        box = (left, top, left + CELL[0] - 1, top + CELL[1] - 1)
        draw.rectangle(box, outline=style.colour, width=FRAME)
        middle = (left + CELL[0] // 2, top + CELL[1] // 2)
        font = canvas.font(13)
        draw.text(middle, "no longer\nreadable", fill=GREY, font=font, anchor="mm", align="center")
    for number, text in enumerate(lines):
        draw.text(
            (left + CELL[0] // 2, top + CELL[1] + 11 + 18 * number),
            canvas.shortened(text, IMAGE[0] + 2 * FRAME, 14),
            fill=INK,
            font=canvas.font(14),
            anchor="mm",
        )
