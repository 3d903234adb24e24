"""The types that the files of a run are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_COUNTS = ("images", "identities", "cameras")
_LARGEST = 1e30  # numbers above are no measurement, and charts have no room for them

Numbers = dict[str, float]


class MetricLine(NamedTuple):
    """A line of metrics.json.

    Attributes:
        step: Steps taken before this line.
        epoch: Epochs finished before this line.
        numbers: Numbers by name; infinite ones are NaN.
    """

    step: int
    epoch: int
    numbers: Numbers


class Evaluation(NamedTuple):
    """Numbers of a test set after some epochs; shares from 0 to 1."""

    test_set: str
    epoch: int
    numbers: Numbers


class HardQuery(NamedTuple):
    """A query with bad results.

    Attributes:
        row: The query's number in the test set.
        path: The query's image; empty if unknown.
        precision: Average precision from 0 to 1; None if unknown.
    """

    row: int
    path: str
    precision: float | None


class CameraPairs(NamedTuple):
    """Mean average precision of (query camera, gallery camera); None if no query has a match."""

    query_cameras: list[int]
    gallery_cameras: list[int]
    precision: list[list[float | None]]


class Details(NamedTuple):
    """Details of a test set's last evaluation.

    Attributes:
        test_set: The test set's name.
        epoch: Finished epochs at the evaluation; None if unknown.
        precision: Average precision of each query that has a match, 0 to 1.
        hardest: The hardest queries, worst first.
        cameras: mAP by pairs of cameras; None if unknown.
    """

    test_set: str
    epoch: int | None
    precision: list[float]
    hardest: list[HardQuery]
    cameras: CameraPairs | None


class ClusteredImage(NamedTuple):
    """A line of clusters.csv; `confidence` is None for outliers, whose cluster is -1."""

    path: str
    cluster: int
    camera: str
    confidence: float | None


class MatchedPair(NamedTuple):
    """A line of matches.csv; `cluster` is the cluster of both images, or empty."""

    path: str
    other_path: str
    camera: str
    other_camera: str
    similarity: float
    cluster: str


class Split(NamedTuple):
    """A split of a data set; a count is None if it is unknown.

    0 identities mean unlabelled, and 0 cameras mean that cameras are unknown.
    """

    dataset: str
    split: str
    version: str
    images: int | None
    identities: int | None
    cameras: int | None


@dataclass
class Log:
    """The content of log.txt from the start of a run on, including all resumptions.

    Attributes:
        environment: (name, value) of the latest environment.
        warnings: The last warnings and errors, with the number of times each was logged.
        stopped: The error or signal that stopped the run, or empty.
    """

    environment: list[tuple[str, str]] = field(default_factory=list)
    warnings: dict[str, int] = field(default_factory=dict)
    stopped: str = ""


@dataclass
class RunFiles:
    """A run, as far as its files describe it.

    Attributes:
        folder: The folder as the user gave it.
        name: The folder's name.
        config_text: The text of config.yaml.
        settings: The config's values by dotted upper-case key, as on a command line.
        labels: Statistics of each epoch's labels.
        training: Losses, learning rate and times.
        evaluations: The evaluations in order.
        details: Details of the last evaluation of each test set.
        best_metric: The number that chose the best epoch.
        provenance: As `reid.assembly.provenance` describes it; empty if unknown.
        log: See `Log`.
        clusters: Lines of clusters.csv.
        matches: Lines of matches.csv.
        pictures: The existing files of `PICTURES`, by name.
        nonfinite: Number of reports of losses that were not finite.
        has_final_weights: Whether training has finished at least once.
        problems: Sentences about missing or broken files.
    """

    folder: Path
    name: str
    config_text: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    labels: list[MetricLine] = field(default_factory=list)
    training: list[MetricLine] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)
    best_metric: str = "mAP"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    clusters: list[ClusteredImage] = field(default_factory=list)
    matches: list[MatchedPair] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)
    nonfinite: int = 0
    has_final_weights: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def max_epochs(self) -> int:
        """Epochs that the config asks for; 0 if unknown."""
        return whole_number(self.settings.get("SOLVER.MAX_EPOCHS")) or 0

    @property
    def epochs_begun(self) -> int:
        """Number of epochs with a line in metrics.json."""
        return max((line.epoch + 1 for line in (*self.labels, *self.training)), default=0)

    @property
    def finished(self) -> bool:
        """Whether training has finished."""
        return self.has_final_weights and self.epochs_begun >= self.max_epochs

    @property
    def clusterer(self) -> dict[str, Any] | None:
        """NAME and options of the clusterer; None: unknown, or the labels are identities."""
        options = {
            key.partition(".")[2]: value
            for key, value in self.settings.items()
            if key.startswith("CLUSTERER.")
        }
        return options if isinstance(options.get("NAME"), str) else None

    @property
    def writes_clusters(self) -> bool:
        """Whether the final model's clusters are written at the end (hook WriteClusters)."""
        return any(
            key.startswith("HOOKS") and "WriteClusters" in (value, *sequence(value))
            for key, value in self.settings.items()
        )

    @property
    def data(self) -> list[Split]:
        """The counts of each split of the data."""
        found = []
        for split in sequence(self.provenance.get("data")):
            if isinstance(split, dict):
                names = [str(split.get(key) or "") for key in ("dataset", "split", "version")]
                counts = (whole_number(split.get(key)) for key in _COUNTS)
                found.append(Split(names[0], names[1], names[2], *counts))
        return found


def whole_number(value: object) -> int | None:
    """The value, if it is a whole number that fits into 64 bits."""
    fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value if fits else None  # type: ignore[return-value]


def number(value: object) -> float | None:
    """The value, if it is a number; NaN if it is infinite or absurdly large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else float("nan")


def sequence(value: object) -> list[Any]:
    """The value, if it is a list; else an empty list."""
    return value if isinstance(value, list) else []
