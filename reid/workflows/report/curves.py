"""The curves of one run or of several: a chart for each quantity, a line for each run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from reid.workflows.report.charts import ChartMaker, Line, number_text, thinned
from reid.workflows.report.run_files import MetricLine, RunFiles

_RESULTS = ("mAP", "Rank-1")
_LABELS = (
    "clusters", "outliers", "agreement", "cross-camera", "largest", "images/cluster", "silhouette",
    "purity", "ARI", "NMI", "proxies",
)  # fmt: skip
_NOT_LABELS = ("kept", "extraction_time", "label_time")
_NOT_LOSSES = ("data_time", "step_time", "memory_mb")
_ABOUT = {
    "clusters": "groups of images that training treats as persons",
    "outliers": "images in no cluster",
    "agreement": "with the epoch before: adjusted Rand index, 1 = the same clusters",
    "cross-camera": "share of the clusters with images from several cameras",
    "largest": "images in the largest cluster",
    "silhouette": "1 = clusters far apart, 0 = on each other's border",
    "purity": "share of images that show their cluster's main person",
    "ARI": "with the identities: adjusted Rand index",
    "NMI": "with the identities: normalised mutual information",
    "proxies": "a camera's part of a cluster",
    "lr": "learning rate",
}
_POINTS = 400  # of a line, shared by the runs
_FEWEST_POINTS = 60
_MOST_CHARTS = 30  # of a group

Read = Callable[[RunFiles], Line]


class Chart(NamedTuple):
    """A chart with its caption.

    Attributes:
        title: The quantity that it shows.
        about: An explanation, or empty.
        last: The last value of each run, or empty.
        svg: The picture.
    """

    title: str
    about: str
    last: list[str]
    svg: Markup


class Group(NamedTuple):
    """Charts that belong together.

    Attributes:
        title: Title of the group.
        charts: The charts in order.
        note: Says what is not shown, or empty.
    """

    title: str
    charts: list[Chart]
    note: str


def curve_groups(runs: Sequence[RunFiles], maker: ChartMaker) -> list[Group]:
    """Draws results and clusters by epoch, and losses and learning rate by step.

    A quantity gets a chart if a run has two values of it; a group without charts says so.
    """
    points = max(_FEWEST_POINTS, _POINTS // len(runs))
    groups = []
    for title, label, quantities in (
        ("Results by epoch, %", "epoch", _result_quantities(runs)),
        ("Clusters by epoch", "epoch", _label_quantities(runs)),
        ("Losses and learning rate by step", "step", _loss_quantities(runs)),
    ):
        charts = []
        named = list(quantities)
        for name, read in named[:_MOST_CHARTS]:
            lines = [read(run) for run in runs]
            if max(len(line.x) for line in lines) < 2:
                continue
            thin = [thinned(line, points) for line in lines]
            reference = _known_persons(runs) if name == "clusters" else None
            about = _ABOUT.get(name, "")
            if reference is not None:
                about += f"; dashed: {reference} known persons"
            svg = maker.lines(thin, label, reference)
            last = [number_text(line.y[-1]) if line.y else "-" for line in lines]
            charts.append(Chart(name, about, last, svg))
        groups.append(Group(title, charts, _note(len(named), charts, label)))
    return groups


def precision_chart(runs: Sequence[RunFiles], test_set: str, maker: ChartMaker) -> Markup | None:
    """Draws a histogram of the queries' average precision; None if no run knows it.

    Args:
        runs: Run i has the page's colour i.
        test_set: The test set's name.
        maker: Draws the page's charts.
    """
    values = [
        next((entry.precision for entry in run.details if entry.test_set == test_set), [])
        for run in runs
    ]
    if not any(values):
        return None
    return maker.histogram(values, "average precision, %")


def _note(known: int, charts: Sequence[Chart], label: str) -> str:
    if not known:
        return "metrics.json has nothing of this."
    if not charts:
        return f"There is no curve yet: nothing has values of two {label}s."
    if known > _MOST_CHARTS:
        return f"The first {_MOST_CHARTS} of {known} are drawn."
    return ""


def _result_quantities(runs: Sequence[RunFiles]) -> Iterator[tuple[str, Read]]:
    sets = dict.fromkeys(entry.test_set for run in runs for entry in run.evaluations)
    metrics = dict.fromkeys((*(run.best_metric for run in runs), *_RESULTS))
    for test_set in sets:
        for metric in metrics:
            if any(
                entry.test_set == test_set and metric in entry.numbers
                for run in runs
                for entry in run.evaluations
            ):
                name = metric if len(sets) == 1 else f"{metric}, {test_set}"
                yield name, _result_reader(test_set, metric)


def _result_reader(test_set: str, metric: str) -> Read:
    def read(run: RunFiles) -> Line:
        found = [
            (entry.epoch, 100 * entry.numbers[metric])
            for entry in run.evaluations
            if entry.test_set == test_set and metric in entry.numbers
        ]
        return Line([epoch for epoch, _ in found], [value for _, value in found])

    return read


def _label_quantities(runs: Sequence[RunFiles]) -> Iterator[tuple[str, Read]]:
    names = dict.fromkeys(name for run in runs for line in run.labels for name in line.numbers)
    for name in sorted(names, key=lambda name: _LABELS.index(name) if name in _LABELS else 99):
        if name not in _NOT_LABELS:
            yield name, _line_reader(name, lambda run: run.labels, lambda line: line.epoch + 1)


def _loss_quantities(runs: Sequence[RunFiles]) -> Iterator[tuple[str, Read]]:
    names = dict.fromkeys(name for run in runs for line in run.training for name in line.numbers)
    for name in sorted(names, key=lambda name: (name != "loss", name == "lr")):
        if name not in _NOT_LOSSES:
            yield name, _line_reader(name, lambda run: run.training, lambda line: line.step)


def _line_reader(
    name: str, lines: Callable[[RunFiles], list[MetricLine]], place: Callable[[MetricLine], int]
) -> Read:
    def read(run: RunFiles) -> Line:
        known = [line for line in lines(run) if name in line.numbers]
        return Line([place(line) for line in known], [line.numbers[name] for line in known])

    return read


def _known_persons(runs: Sequence[RunFiles]) -> int | None:
    """The number of identities in the training images, if all runs have the same."""
    known = {split.identities for run in runs for split in run.data if split.split == "train"}
    only = known.pop() if len(known) == 1 else None
    return only or None
