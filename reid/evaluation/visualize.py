"""Pictures of ranked lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from reid.files import replacing
from reid.structures import DataError

_IMAGE = (96, 192)  # width, height in pixels
_FRAME = 5
_GAP = 10
_QUERY_GAP = 30  # between the query and its first match
_MARGIN = 24
_HEADER = 34
_LEGEND = 46
_FONT_SIZE = 18

_BACKGROUND = (255, 255, 255)
_INK = (45, 50, 58)
_QUERY = (45, 50, 58)
_RIGHT = (34, 160, 84)
_WRONG = (212, 56, 56)
_CELL = (_IMAGE[0] + 2 * _FRAME, _IMAGE[1] + 2 * _FRAME)


def draw_ranked_lists(
    path: Path, queries: Sequence[str], matches: Sequence[Sequence[tuple[str, bool]]]
) -> None:
    """Draws one row per query: the query, then its matches in order, right ones framed in green.

    Args:
        path: The PNG to write. Its folder is made; an older file is replaced as a whole.
        queries: Q paths of images.
        matches: For each query (path of an image, is the same person), best first. Rows may
            differ in length.

    Raises:
        ValueError: There is no query, or not one list of matches per query.
        DataError: An image cannot be read.
    """
    if not queries:
        raise ValueError("queries: expected one or more, got none")
    if len(matches) != len(queries):
        raise ValueError(f"matches: expected {len(queries)} lists, got {len(matches)}")
    columns = max(len(row) for row in matches)
    font = ImageFont.load_default(size=_FONT_SIZE)
    # The legend needs some width even below a single match.
    width = max(_left_of(max(columns, 1)) - _GAP + _MARGIN, 400)
    height = _MARGIN + _HEADER + len(queries) * (_CELL[1] + _GAP) - _GAP + _LEGEND + _MARGIN
    picture = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)

    titles = ["query", *(str(rank) for rank in range(1, columns + 1))]
    for column, title in enumerate(titles):
        middle = (_left_of(column - 1) + _CELL[0] // 2, _MARGIN + _HEADER // 2 - 4)
        draw.text(middle, title, fill=_INK, font=font, anchor="mm")
    for row, (query, found) in enumerate(zip(queries, matches, strict=True)):
        top = _MARGIN + _HEADER + row * (_CELL[1] + _GAP)
        _paste(picture, query, _QUERY, (_left_of(-1), top))
        for column, (name, right) in enumerate(found):
            _paste(picture, name, _RIGHT if right else _WRONG, (_left_of(column), top))
    _draw_legend(draw, height - _MARGIN - _LEGEND // 2 + 8, font)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _left_of(column: int) -> int:
    """Left edge of a match's cell; the query is column -1."""
    if column < 0:
        return _MARGIN
    return _MARGIN + _CELL[0] + _QUERY_GAP + column * (_CELL[0] + _GAP)


def _paste(
    picture: Image.Image, name: str, colour: tuple[int, int, int], corner: tuple[int, int]
) -> None:
    try:
        with Image.open(name) as image:
            small = image.convert("RGB").resize(_IMAGE, Image.Resampling.BICUBIC)
    except OSError as error:
        raise DataError(f"{name}: is not a readable image ({error})") from error
    picture.paste(colour, (*corner, corner[0] + _CELL[0], corner[1] + _CELL[1]))
    picture.paste(small, (corner[0] + _FRAME, corner[1] + _FRAME))


def _draw_legend(
    draw: ImageDraw.ImageDraw, middle: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    left = _MARGIN
    entries = ((_QUERY, "query"), (_RIGHT, "same person"), (_WRONG, "other person"))
    for colour, text in entries:
        draw.rectangle((left, middle - 8, left + 16, middle + 8), outline=colour, width=4)
        draw.text((left + 26, middle), text, fill=_INK, font=font, anchor="lm")
        left += 26 + round(draw.textlength(text, font=font)) + 28
