"""Pictures made of images: ranked lists, cluster contact sheets, attention maps, part stripes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from reid.evaluation.matches import camera_name
from reid.evaluation.relevance import Verdict
from reid.pictures import canvas
from reid.pictures.canvas import (
    CELL,
    FRAME,
    GAP,
    GREEN,
    GREY,
    IMAGE,
    INK,
    MARGIN,
    PALETTE,
    RED,
    Style,
    font,
    text_width,
)
from reid.structures import OUTLIER, ImageRecord

T = TypeVar("T")

_QUERY = Style("query", INK)
_VERDICTS: dict[Verdict, Style] = {
    "same": Style("same person", GREEN, "tick"),
    "other": Style("other person", RED, "cross"),
    "junk": Style("left out by the protocol", GREY, "dash"),
}
_QUERY_GAP = 30  # between the query and its first match
_HEADER = 34
_LEGEND = 46
_BAND = 24  # height of the camera's band below an image


def draw_ranked_lists(
    path: Path, queries: Sequence[str], matches: Sequence[Sequence[tuple[str, Verdict]]]
) -> None:
    """Draws one row per query: the query, then its matches in order.

    Right ones have a green frame and a tick, wrong ones a red frame and a cross, junk a dashed
    grey frame.

    Args:
        path: The PNG to write. A missing folder is made; an older file is replaced.
        queries: Q paths of images.
        matches: For each query (path of an image, verdict), best first. Rows may differ in length.

    Raises:
        ValueError: There is no query, or not one list of matches per query.
        DataError: An image cannot be read.
    """
    if not queries:
        raise ValueError("queries: expected one or more, got none")
    if len(matches) != len(queries):
        raise ValueError(f"matches: expected {len(queries)} lists, got {len(matches)}")
    columns = max(len(row) for row in matches)
    found = {verdict for row in matches for _, verdict in row}
    legend = [_QUERY, *(style for verdict, style in _VERDICTS.items() if verdict in found)]
    lefts = [MARGIN, *(MARGIN + CELL[0] + _QUERY_GAP + i * (CELL[0] + GAP) for i in range(columns))]
    # The legend may be wider than the images.
    width = max(lefts[-1] + CELL[0] + MARGIN, _legend_width(legend))
    height = MARGIN + _HEADER + len(queries) * (CELL[1] + GAP) - GAP + _LEGEND + MARGIN
    picture, draw = canvas.canvas(width, height)
    titles = ["query", *(str(rank) for rank in range(1, columns + 1))]
    for left, title in zip(lefts, titles, strict=True):
        middle = (left + CELL[0] // 2, MARGIN + _HEADER // 2 - 4)
        draw.text(middle, title, fill=INK, font=font(), anchor="mm")
    for row, (query, line) in enumerate(zip(queries, matches, strict=True)):
        top = MARGIN + _HEADER + row * (CELL[1] + GAP)
        canvas.paste_tile(picture, query, (lefts[0], top), _QUERY)
        for left, (name, verdict) in zip(lefts[1:], line, strict=False):
            canvas.paste_tile(picture, name, (left, top), _VERDICTS[verdict])
    canvas.draw_legend(draw, MARGIN, height - MARGIN - _LEGEND // 2 + 8, legend)
    canvas.save(picture, path)


def draw_clusters(
    path: Path,
    clusters: Sequence[int] | Tensor,
    records: Sequence[ImageRecord],
    *,
    rows: int = 10,
    columns: int = 12,
    chosen: Sequence[int] | None = None,
) -> list[int]:
    """Draws a contact sheet: one row per cluster, its images ordered by camera.

    A coloured band below each image names the camera (see `camera_name`). If identities are known,
    a cross marks images of another person than the cluster's most frequent one.

    Args:
        path: The PNG to write.
        clusters: (N,) the cluster of each image, -1 = outlier.
        records: The N images.
        rows: Clusters to draw, spread evenly from the largest to the smallest.
        columns: Images per row; larger clusters show every n-th image.
        chosen: The clusters to draw, in this order, in place of `rows`; -1 draws outliers.

    Returns:
        The clusters drawn, from top to bottom.

    Raises:
        ValueError: Lengths do not fit, a number is below 1, or there is no such cluster.
        DataError: An image cannot be read.
    """
    if min(rows, columns) < 1:
        raise ValueError(f"expected rows and columns of 1 or more, got {rows}, {columns}")
    members = _members(torch.as_tensor(clusters).tolist(), records)
    chosen = _from_large_to_small(members, rows) if chosen is None else _known(members, chosen)
    widest = min(columns, max(len(members[label]) for label in chosen))
    mixed = Style("not the cluster's main person", RED, "cross")
    side = 190
    cell = (CELL[0], CELL[1] + _BAND)
    legend = [mixed] if any(record.pid >= 0 for record in records) else []
    width = max(MARGIN + side + widest * (cell[0] + GAP) - GAP + MARGIN, _legend_width(legend), 480)
    height = MARGIN + _HEADER + len(chosen) * (cell[1] + GAP) + (_LEGEND if legend else 0) + MARGIN
    picture, draw = canvas.canvas(width, height)
    outliers = len(members.get(OUTLIER, ()))
    count = len(members) - (outliers > 0)
    title = f"{len(chosen)} of {count} clusters, {outliers} of {len(records)} images are outliers"
    draw.text((MARGIN, MARGIN + 4), title, fill=INK, font=font(), anchor="lm")
    for row, label in enumerate(chosen):
        top = MARGIN + _HEADER + row * (cell[1] + GAP)
        inside = sorted(members[label], key=lambda record: (record.camid, record.path))
        _caption(draw, (MARGIN, top), label, inside)
        main = Counter(record.pid for record in inside if record.pid >= 0).most_common(1)
        for column, record in enumerate(_spread(inside, columns)):
            left = MARGIN + side + column * (cell[0] + GAP)
            wrong = bool(main) and record.pid >= 0 and record.pid != main[0][0]
            style = mixed if wrong and label != OUTLIER else Style("", GREY)
            canvas.paste_tile(picture, record.path, (left, top), style)
            _camera_band(draw, (left, top + CELL[1]), record)
    if legend:
        canvas.draw_legend(draw, MARGIN, height - MARGIN - _LEGEND // 2 + 8, legend)
    canvas.save(picture, path)
    return list(chosen)


def _members(labels: Sequence[int], records: Sequence[ImageRecord]) -> dict[int, list[ImageRecord]]:
    if len(labels) != len(records):
        raise ValueError(f"clusters: expected {len(records)}, one per image, got {len(labels)}")
    members: dict[int, list[ImageRecord]] = {}
    for label, record in zip(labels, records, strict=True):
        members.setdefault(label, []).append(record)
    return members


def _known(members: Mapping[int, Sequence[ImageRecord]], chosen: Sequence[int]) -> Sequence[int]:
    unknown = [label for label in chosen if label not in members]
    if unknown or not chosen:
        raise ValueError(f"chosen: expected clusters that have images, got {unknown or 'none'}")
    return chosen


def _from_large_to_small(members: Mapping[int, Sequence[ImageRecord]], count: int) -> list[int]:
    """At most `count` clusters, spread evenly from the largest to the smallest.

    Raises:
        ValueError: All images are outliers.
    """
    known = sorted(members.keys() - {OUTLIER}, key=lambda label: (-len(members[label]), label))
    if not known:
        raise ValueError("clusters: there is none to draw, all images are outliers")
    return _spread(known, count)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, spread evenly, with the first and the last."""
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round())
    return [items[int(place)] for place in places]


def draw_pairs(path: Path, pairs: Sequence[tuple[str, str, str]], *, columns: int = 4) -> None:
    """Draws pairs of images side by side, each with a line of text below.

    Args:
        path: The PNG to write.
        pairs: (path of an image, path of another, text), row by row.
        columns: Pairs in a row.

    Raises:
        ValueError: There is no pair, or `columns` is below 1.
        DataError: An image cannot be read.
    """
    if not pairs or columns < 1:
        raise ValueError(f"expected pairs and columns of 1 or more, got {len(pairs)}, {columns}")
    columns = min(columns, len(pairs))
    wide = max(2 * CELL[0], *(text_width(text, 15) for _, _, text in pairs)) + 2 * GAP
    high = CELL[1] + _BAND + GAP
    rows = -(-len(pairs) // columns)
    picture, draw = canvas.canvas(2 * MARGIN + columns * wide, 2 * MARGIN + rows * high)
    for number, (one, other, text) in enumerate(pairs):
        left, top = MARGIN + number % columns * wide, MARGIN + number // columns * high
        for column, name in enumerate((one, other)):
            canvas.paste_tile(picture, name, (left + column * CELL[0], top), Style("", GREY))
        middle = (left + CELL[0], top + CELL[1] + _BAND // 2)
        draw.text(middle, text, fill=INK, font=font(15), anchor="mm")
    canvas.save(picture, path)


def draw_attention(
    path: Path, images: Sequence[str], columns: Sequence[tuple[str, Tensor]]
) -> None:
    """Draws images, and beside each its attention maps laid over the image (TMGF, figure 3).

    Every map is stretched from its smallest to its largest value; dark is low, bright is high.

    Args:
        path: The PNG to write.
        images: Q paths of images.
        columns: (title, maps (Q, h, w) of values from 0) from left to right.

    Raises:
        ValueError: There is no image or no column, or a column has not one map per image.
        DataError: An image cannot be read.
    """
    if not images or not columns:
        raise ValueError("expected one or more images and columns")
    for title, maps in columns:
        if maps.ndim != 3 or len(maps) != len(images):
            raise ValueError(
                f"{title}: expected maps ({len(images)}, h, w), got {tuple(maps.shape)}"
            )
    titles = ["image", *(title for title, _ in columns)]
    widths = [max(IMAGE[0], text_width(title)) for title in titles]
    lefts = [MARGIN + sum(widths[:i]) + i * 2 * GAP for i in range(len(titles))]
    height = MARGIN + _HEADER + len(images) * (IMAGE[1] + GAP) - GAP + MARGIN
    picture, draw = canvas.canvas(lefts[-1] + widths[-1] + MARGIN, height)
    for left, wide, title in zip(lefts, widths, titles, strict=True):
        middle = (left + wide // 2, MARGIN + _HEADER // 2 - 4)
        draw.text(middle, title, fill=INK, font=font(), anchor="mm")
    for row, name in enumerate(images):
        top = MARGIN + _HEADER + row * (IMAGE[1] + GAP)
        image = canvas.read_image(name)
        picture.paste(image, (lefts[0] + (widths[0] - IMAGE[0]) // 2, top))
        for left, wide, (_, maps) in zip(lefts[1:], widths[1:], columns, strict=True):
            picture.paste(_heat(image, maps[row]), (left + (wide - IMAGE[0]) // 2, top))
    canvas.save(picture, path)


def stripe_edges(rows: int, parts: int) -> list[tuple[float, float]]:
    """Top and bottom of horizontal parts as shares of the height, as the TMGF head cuts them.

    Args:
        rows: Rows in the map of tokens.
        parts: Number of parts; if it does not divide the rows, the upper parts have a row more.

    Raises:
        ValueError: There are more parts than rows, or none.
    """
    if not 1 <= parts <= rows:
        raise ValueError(f"parts: expected 1 to {rows}, got {parts}")
    stripes = torch.arange(rows).tensor_split(parts)
    return [(int(stripe[0]) / rows, (int(stripe[-1]) + 1) / rows) for stripe in stripes]


def draw_stripes(
    path: Path, images: Sequence[str], rows: int, granularities: Sequence[int]
) -> None:
    """Draws images with the horizontal parts of each branch.

    Args:
        path: The PNG to write.
        images: Q paths of images.
        rows: Rows in the map of tokens.
        granularities: Number of parts of each branch.

    Raises:
        ValueError: There is no image or no part, or there are more parts than rows.
        DataError: An image cannot be read.
    """
    if not images or not granularities:
        raise ValueError("expected one or more images and parts")
    label, block = 44, IMAGE[0] + 60
    width = MARGIN + IMAGE[0] + 2 * GAP + len(granularities) * block + MARGIN
    height = MARGIN + _HEADER + len(images) * (IMAGE[1] + GAP) - GAP + MARGIN
    picture, draw = canvas.canvas(width, height)
    lefts = [MARGIN + IMAGE[0] + 2 * GAP + i * block + label for i in range(len(granularities))]
    draw.text((MARGIN + IMAGE[0] // 2, MARGIN + 10), "image", fill=INK, font=font(), anchor="mm")
    for branch, left in enumerate(lefts, 1):
        middle = (left + IMAGE[0] // 2, MARGIN + 10)
        draw.text(middle, f"branch {branch}", fill=INK, font=font(), anchor="mm")
    for row, name in enumerate(images):
        top = MARGIN + _HEADER + row * (IMAGE[1] + GAP)
        image = canvas.read_image(name)
        picture.paste(image, (MARGIN, top))
        number = 0
        for left, parts in zip(lefts, granularities, strict=True):
            picture.paste(image, (left, top))
            for start, end in stripe_edges(rows, parts):
                colour = PALETTE[number % len(PALETTE)]
                number += 1
                box = (left, top + round(start * IMAGE[1]), left + IMAGE[0] - 1,
                       top + round(end * IMAGE[1]) - 1)  # fmt: skip
                draw.rectangle(box, outline=colour, width=4)
                middle = (left - 16, (box[1] + box[3]) // 2)
                draw.text(middle, str(number), fill=INK, font=font(), anchor="mm")
    canvas.save(picture, path)


def camera_colour(camid: int) -> tuple[int, int, int]:
    """The colour of a camera, grey if it is unknown; colours repeat after eight cameras."""
    return GREY if camid < 0 else PALETTE[camid % len(PALETTE)]


def _legend_width(styles: Sequence[Style]) -> int:
    return 2 * MARGIN + sum(60 + text_width(style.text) for style in styles)


def _caption(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], label: int, inside: Sequence[ImageRecord]
) -> None:
    cameras = len({record.camid for record in inside if record.camid >= 0})
    people = len({record.pid for record in inside if record.pid >= 0})
    lines = [
        "outliers" if label == OUTLIER else f"cluster {label}",
        f"{len(inside)} image{'s' * (len(inside) > 1)}",
        *([f"{cameras} camera{'s' * (cameras > 1)}"] if cameras else []),
        *([f"{people} identit{'ies' if people > 1 else 'y'}"] if people else []),
    ]
    for number, text in enumerate(lines):
        where = (corner[0], corner[1] + FRAME + 26 * number)
        draw.text(where, text, fill=INK, font=font(), anchor="lt")


def _camera_band(draw: ImageDraw.ImageDraw, corner: tuple[int, int], record: ImageRecord) -> None:
    left, top = corner
    name = camera_name(record) or "?"
    text = f"camera {name}" if name == "?" or name.isdigit() else name
    colour = camera_colour(record.camid)
    draw.rectangle((left, top, left + CELL[0] - 1, top + _BAND - 1), fill=colour)
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 140
    draw.text(
        (left + CELL[0] // 2, top + _BAND // 2),
        canvas.shortened(text, CELL[0] - 8, 15),
        fill=canvas.WHITE if dark else INK,
        font=font(15),
        anchor="mm",
    )


def _heat(image: Image.Image, attention: Tensor) -> Image.Image:
    values = attention.detach().float().cpu().numpy()
    spread = float(values.max() - values.min())
    scaled = (values - values.min()) / spread if spread else np.zeros_like(values)
    large = Image.fromarray((255 * scaled).astype(np.uint8)).resize(
        image.size, Image.Resampling.BICUBIC
    )
    colours = colormaps["inferno"](np.asarray(large) / 255)[..., :3]
    return Image.blend(image, Image.fromarray((255 * colours).astype(np.uint8)), 0.6)
