"""The pictures of a page: hardest queries, clusters, likely matches, sheets of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from reid.workflows.report.charts import percent_text
from reid.workflows.report.images import PictureBudget
from reid.workflows.report.run_files import (
    ClusteredImage,
    Details,
    HardQuery,
    MatchedPair,
    RunFiles,
    whole_number,
)

SHEETS = ("ranked_lists.png", "clusters.png", "similarities.png", "matches.png")
"""Pictures of a run; earlier ones get space on the page first."""
_LARGEST_CLUSTERS = 10
_DOUBTFUL_CLUSTERS = 6
_DOUBTFUL_IMAGES = 8
_PAIRS = 12
_HARDEST = 20


class Tile(NamedTuple):
    """A thumbnail with its text; `picture` is None if the image could not be shown."""

    picture: Markup | None
    path: str
    text: str


class Hardest(NamedTuple):
    """The hardest queries of a test set."""

    test_set: str
    epoch: int | None
    tiles: list[Tile]


class ClusterRow(NamedTuple):
    """A cluster, for the table and as a strip of tiles."""

    number: int
    images: int
    cameras: int
    confidence: str
    tiles: list[Tile]


class Clusters(NamedTuple):
    """The content of clusters.csv.

    Attributes:
        summary: A sentence; empty if the file is missing.
        largest: The largest clusters.
        doubtful: The clusters with the least certain images, with pictures.
    """

    summary: str
    largest: list[ClusterRow]
    doubtful: list[ClusterRow]


class Pair(NamedTuple):
    """Two tiles from different cameras."""

    one: Tile
    other: Tile
    text: str


def hardest_queries(details: Details, budget: PictureBudget) -> Hardest:
    """The hardest queries with their pictures, worst first."""

    def tile(query: HardQuery) -> Tile:
        precision = "" if query.precision is None else f"AP {percent_text(query.precision)} %"
        text = precision or f"query {query.row}"
        return Tile(budget.thumbnail(query.path) if query.path else None, query.path, text)

    return Hardest(
        details.test_set, details.epoch, [tile(query) for query in details.hardest[:_HARDEST]]
    )


def clusters_of(images: Sequence[ClusteredImage], budget: PictureBudget) -> Clusters:
    """The largest clusters, and the least certain ones with their least certain images."""
    if not images:
        return Clusters("", [], [])
    members: dict[int, list[ClusteredImage]] = {}
    for image in images:
        if image.cluster >= 0:
            members.setdefault(image.cluster, []).append(image)
    clustered = sum(map(len, members.values()))
    summary = (
        f"The final model finds {len(members):,} clusters among {len(images):,} images; "
        f"{len(images) - clustered:,} are in none."
    )
    confidence = {number: _confidence(inside) for number, inside in members.items()}
    largest = sorted(members, key=lambda number: -len(members[number]))[:_LARGEST_CLUSTERS]
    doubtful = sorted(members, key=lambda number: confidence[number])[:_DOUBTFUL_CLUSTERS]

    def row(number: int, pictures: bool) -> ClusterRow:
        inside = members[number]
        cameras = Counter(image.camera for image in inside if image.camera)
        tiles = [
            Tile(budget.thumbnail(image.path), image.path, _camera_text(image.camera))
            for image in (inside[-_DOUBTFUL_IMAGES:] if pictures else ())
        ]
        text = f"{confidence[number]:.2f}"
        return ClusterRow(number, len(inside), len(cameras), text, tiles)

    return Clusters(
        summary,
        [row(number, pictures=False) for number in largest],
        [row(number, pictures=True) for number in doubtful],
    )


def _confidence(images: Sequence[ClusteredImage]) -> float:
    return sum(image.confidence or 0.0 for image in images) / len(images)


def likely_pairs(matches: Sequence[MatchedPair], budget: PictureBudget) -> list[Pair]:
    """The first of the matches, which are the most similar ones."""
    found = []
    for match in matches[:_PAIRS]:
        one = Tile(budget.thumbnail(match.path), match.path, _camera_text(match.camera))
        other_path = match.other_path
        other = Tile(budget.thumbnail(other_path), other_path, _camera_text(match.other_camera))
        where = f"cluster {match.cluster}" if match.cluster else "not in one cluster"
        found.append(Pair(one, other, f"similarity {match.similarity:.3f}, {where}"))
    return found


def _camera_text(name: str) -> str:
    return f"camera {name}" if name.isdigit() else name or "camera unknown"


def sheet(run: RunFiles, name: str, budget: PictureBudget, most: int) -> tuple[Markup | None, str]:
    """A picture of the run, or the reason why it is missing."""
    path = run.pictures.get(name)
    if path is None:
        return None, _why_no_picture(run, name)
    picture = budget.sheet(path, most)
    if picture is not None:
        return picture, ""
    if str(path) in budget.unread:
        return None, f"{name} cannot be read: {budget.unread[str(path)]}"
    return None, f"{name} has no room on this page: look at {path}"


def _why_no_picture(run: RunFiles, name: str) -> str:
    drawn = whole_number(run.settings.get("TEST.RANKED_LISTS"))
    if name in ("clusters.png", "matches.png") and run.settings and run.clusterer is None:
        return f"There is no {name}: labels are the identities, there are no clusters."
    if name == "matches.png" and not run.writes_clusters:
        return "There is no matches.png: add WriteClusters to HOOKS."
    if not run.finished:
        return f"There is no {name}: it is drawn at the end, which this run has not reached."
    if drawn == 0:
        return f"There is no {name}: TEST.RANKED_LISTS is 0; set it to the number of rows to draw."
    if name != "clusters.png" and not run.evaluations:
        return f"There is no {name}: this run has no test set."
    return f"There is no {name} in the run's folder."
