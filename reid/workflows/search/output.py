"""What a search has found, as text, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from reid.files import near, readable_name, write_text
from reid.pictures.answers import Tile, draw_answers
from reid.shipped import tool
from reid.workflows.search.query import Answer, Answered, Found, Threshold

_HEADER = (
    "query", "query_camera", "rank", "path", "camera", "similarity", "reranked_distance",
    "same_person", "false_matches_per_million",
)  # fmt: skip
_SHOWN_QUERIES, _SHOWN_ANSWERS = 5, 10
_MOST_DRAWN = 50
_WORDS = {True: "yes", False: "no", None: ""}


def text_of(found: Found) -> str:
    """A table for each of the first queries, and what the marks mean."""
    blocks = []
    for query in found.queries[:_SHOWN_QUERIES]:
        table = tabulate(
            [_shown(rank, answer) for rank, answer in enumerate(query.answers[:_SHOWN_ANSWERS], 1)],
            headers=["rank", "similarity", "same person", "camera", "path"],
            disable_numparse=True,
            colalign=("right", "right", "left", "left", "left") if query.answers else None,
        )
        blocks.append(f"{_name(query.path)}\n{table if query.answers else '  no image was found'}")
    left = len(found.queries) - _SHOWN_QUERIES
    if left > 0:
        blocks.append(f"... and {left:,} queries more: --csv, --json and --picture have them")
    blocks.append(threshold_text(found.threshold, len(found.gallery)))
    if found.unreadable:
        reasons = [why or path for path, why in found.unreadable[:_SHOWN_QUERIES]]
        blocks.append(f"{len(found.unreadable)} queries could not be read: {'; '.join(reasons)}")
    return "\n\n".join(blocks)


def threshold_text(threshold: Threshold | None, count: int) -> str:
    """What the marks mean for a gallery of so many images."""
    if threshold is None:
        return f"same person: unknown, since the model has no thresholds ({tool('thresholds')})"
    rate = threshold.false_per_million
    told = "labelled pairs" if threshold.source == "pairs" else "clusters, not labels: take care"
    return (
        f"same person: similarity of {threshold.similarity:.3f} or more, {rate:,.0f} false matches "
        f"per million pairs of different persons (from {told});\n"
        f"in a gallery of {count:,} images about {rate * count / 1e6:.2g} false matches per query"
    )


def write_csv(path: Path, found: Found) -> None:
    """A line for each answer.

    Raises:
        OutputError: The file cannot be written.
    """
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(_HEADER)
    for query in found.queries:
        for rank, answer in enumerate(query.answers, 1):
            writer.writerow([
                query.path, query.camera, rank, answer.path, answer.camera,
                f"{answer.similarity:.6f}", _number(answer.distance), _WORDS[answer.same],
                _number(answer.false_per_million),
            ])  # fmt: skip
    write_text(path, lines.getvalue())


def write_json(path: Path, found: Found) -> None:
    """All that was found, and what with.

    Raises:
        OutputError: The file cannot be written.
    """
    gallery = found.gallery
    content: dict[str, Any] = {
        "images": len(gallery),
        "model": asdict(gallery.origin),
        "index": asdict(gallery.note),
        "threshold": None if found.threshold is None else asdict(found.threshold),
        "reranked": found.reranked,
        "queries": [asdict(query) for query in found.queries],
        "unreadable": found.unreadable,
    }
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_picture(path: Path, found: Found) -> None:
    """Rows of the first queries with their answers.

    Raises:
        OutputError: The file cannot be written.
    """
    drawn = found.queries[:_MOST_DRAWN]
    draw_answers(
        path,
        [(query.path, query.camera) for query in drawn],
        [_tiles(query) for query in drawn],
    )


def _tiles(query: Answered) -> list[Tile]:
    return [
        Tile(answer.path, (f"{answer.similarity:.3f}", answer.camera), answer.same)
        for answer in query.answers[: 2 * _SHOWN_ANSWERS]
    ]


def _shown(rank: int, answer: Answer) -> list[str]:
    said = _WORDS[answer.same] or "?"
    return [
        str(rank),
        f"{answer.similarity:.3f}",
        said,
        readable_name(answer.camera),
        _name(answer.path),
    ]


def _name(path: str) -> str:
    return readable_name(near(path))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
