"""What is known of a run: the types that its files are read into."""

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
        step: Steps that were taken before.
        epoch: Epochs that were finished before.
        numbers: By name; those that are not finite are NaN.
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
    """A query that the model does badly on.

    Attributes:
        row: Its number in the test set.
        path: Of its image; empty if unknown.
        precision: Average precision from 0 to 1; None if unknown.
    """

    row: int
    path: str
    precision: float | None


class CameraPairs(NamedTuple):
    """Mean average precision of (query camera, gallery camera); None where nothing matches."""

    query_cameras: list[int]
    gallery_cameras: list[int]
    precision: list[list[float | None]]


class Details(NamedTuple):
    """What lies behind a test set's last numbers.

    Attributes:
        test_set: Its name.
        epoch: After which; None if unknown.
        precision: Average precision of each query that has a match, 0 to 1.
        hardest: Worst first.
        cameras: None if unknown.
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
    """A line of matches.csv; `cluster` is the common one, or empty."""

    path: str
    other_path: str
    camera: str
    other_camera: str
    similarity: float
    cluster: str


class Split(NamedTuple):
    """A split of a data set; a count is None where it is unknown.

    0 identities: unlabelled; 0 cameras: unknown.
    """

    dataset: str
    split: str
    version: str
    images: int | None
    identities: int | None
    cameras: int | None


@dataclass
class Log:
    """What log.txt tells of a run, from its start on, over all times that it was resumed.

    Attributes:
        environment: (name, value) of what it ran on last.
        warnings: Warnings and errors with how often each came, the last ones.
        stopped: By what it was stopped, or nothing.
    """

    environment: list[tuple[str, str]] = field(default_factory=list)
    warnings: dict[str, int] = field(default_factory=dict)
    stopped: str = ""


@dataclass
class RunFiles:
    """A run, as far as its files tell.

    Attributes:
        folder: As the user gave it.
        name: Of the folder.
        config_text: config.yaml as it stands there.
        settings: Its values by dotted upper-case key, as a command line takes them.
        labels: Statistics of each epoch's labels.
        training: Losses, rate and times.
        evaluations: In their order.
        details: Of the last evaluation, by test set.
        best_metric: The number that chose the best epoch.
        provenance: As `reid.assembly.provenance` describes it; empty if unknown.
        log: See `Log`.
        clusters: Lines of clusters.csv.
        matches: Lines of matches.csv.
        pictures: Those of `PICTURES` that are there, by name.
        nonfinite: Reports of losses that were not finite.
        has_final_weights: Whether training came to its end at least once.
        problems: What is missing or broken, in sentences.
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
        """Epochs that were asked for; 0 if unknown."""
        return whole_number(self.settings.get("SOLVER.MAX_EPOCHS")) or 0

    @property
    def epochs_begun(self) -> int:
        """Epochs of which there is a line."""
        return max((line.epoch + 1 for line in (*self.labels, *self.training)), default=0)

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return self.has_final_weights and self.epochs_begun >= self.max_epochs

    @property
    def clusterer(self) -> dict[str, Any] | None:
        """NAME and options of the clusterer; None: labels are identities, or it is not known."""
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
        """What each split of the data holds."""
        found = []
        for split in sequence(self.provenance.get("data")):
            if isinstance(split, dict):
                names = [str(split.get(key) or "") for key in ("dataset", "split", "version")]
                counts = (whole_number(split.get(key)) for key in _COUNTS)
                found.append(Split(names[0], names[1], names[2], *counts))
        return found


def whole_number(value: object) -> int | None:
    """A value of unknown origin, if it is a whole number that fits into 64 bits."""
    fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value if fits else None  # type: ignore[return-value]


def number(value: object) -> float | None:
    """A value of unknown origin, if it is a number; NaN if it is not finite or beyond measure."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else float("nan")


def sequence(value: object) -> list[Any]:
    """A value of unknown origin, if it is a list; else an empty one."""
    return value if isinstance(value, list) else []
