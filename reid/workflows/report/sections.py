"""The sections of one run: state, results, health, pictures, clusters, commands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from reid.shipped import command
from reid.workflows.report import course, health
from reid.workflows.report.charts import number_text, percent_text
from reid.workflows.report.comparison import commit_text
from reid.workflows.report.health import Finding
from reid.workflows.report.images import PictureBudget
from reid.workflows.report.pictures import (
    SHEETS,
    Clusters,
    Hardest,
    Pair,
    clusters_of,
    hardest_queries,
    likely_pairs,
    sheet,
)
from reid.workflows.report.run_files import (
    CameraPairs,
    ClusteredImage,
    RunFiles,
    whole_number,
)

_NOTES = ("results", "details", "settings", "clusters", "clusters_csv", "images")
_MOST_ROWS = 100  # of a table of epochs
_MOST_CAMERAS = 40  # in rows and columns
_LONGEST_CONFIG = 60_000  # characters
_THUMBNAILS_SHARE = 0.4  # of a run's bytes; sheets get the rest


class ResultRow(NamedTuple):
    """A row of the table of results.

    Attributes:
        test_set: The test set's name.
        when: The epoch of the weights, in words.
        counts: Numbers of query and gallery images, as text.
        numbers: Numbers in percent, by name.
        last: Whether these are the numbers to report.
    """

    test_set: str
    when: str
    counts: tuple[str, str]
    numbers: dict[str, str]
    last: bool


class Cell(NamedTuple):
    """A cell of the camera-pair matrix; `share` is None if no query has a match."""

    text: str
    share: float | None


class Matrix(NamedTuple):
    """The camera-pair matrix of a test set, with a row per query camera, and a note on its size."""

    test_set: str
    columns: list[int]
    rows: list[tuple[int, list[Cell]]]
    note: str


@dataclass
class RunSection:
    """Everything that a page shows about a run; see `run_section`."""

    run: RunFiles
    title: str
    state: str
    results: list[ResultRow]
    findings: list[Finding]
    hardest: list[Hardest]
    matrices: list[Matrix]
    clusters: Clusters
    pairs: list[Pair]
    sheets: dict[str, tuple[Markup | None, str]]
    epochs: tuple[list[str], list[list[str]]]
    environment: list[tuple[str, str]]
    data: list[list[str]]
    repeat: str
    resume: str
    config_text: str
    notes: dict[str, str] = field(default_factory=dict)


def run_section(run: RunFiles, title: str, size: int) -> RunSection:
    """Collects everything that a page shows about a run.

    Args:
        run: The content of the run's files.
        title: The run's name, unique on the page.
        size: Bytes that the run's pictures may have.
    """
    small = PictureBudget(int(size * _THUMBNAILS_SHARE))
    hardest = [hardest_queries(details, small) for details in run.details]
    clusters = clusters_of(run.clusters, small)
    pairs = likely_pairs(run.matches, small)
    large = PictureBudget(size - int(size * _THUMBNAILS_SHARE) + small.left)
    sheets = {}
    for place, name in enumerate(SHEETS):
        sheets[name] = sheet(run, name, large, large.left // (len(SHEETS) - place) * 2)
    section = RunSection(
        run=run,
        title=title,
        state=_state(run),
        results=_results(run),
        findings=_findings(run),
        hardest=hardest,
        matrices=[_matrix(d.test_set, d.cameras) for d in run.details if d.cameras],
        clusters=clusters,
        pairs=pairs,
        sheets=sheets,
        epochs=_epochs(run),
        environment=_environment(run),
        data=[
            [
                *split[:3],
                _count(split.images),
                _count(split.identities) if split.identities else "unlabelled",
                _count(split.cameras) if split.cameras else "unknown",
            ]
            for split in run.data
        ],
        repeat=_repeat(run),
        resume="" if run.finished else _train_command(run, run.folder, "--resume"),
        config_text=run.config_text[:_LONGEST_CONFIG],
    )
    section.notes = _notes(run, small, len(run.config_text) > _LONGEST_CONFIG)
    return section


def _state(run: RunFiles) -> str:
    known = f" of {run.max_epochs}" if run.max_epochs else ""
    if run.finished:
        return f"finished after {run.epochs_begun or run.max_epochs} epochs"
    if not run.epochs_begun:
        reached = "ended before the first epoch"
    else:
        reached = f"ended in or after epoch {run.epochs_begun}{known}"
    if run.log.stopped:
        return f"{reached}, stopped by {run.log.stopped}"
    return f"{reached}; log.txt does not say why: killed, or still running"


def _results(run: RunFiles) -> list[ResultRow]:
    """The rows of `summary_table`: before training, at the best epoch, and at the end."""
    rows = []
    trained = [entry for entry in run.evaluations if entry.epoch] or run.evaluations
    first = trained[0].test_set if trained else ""
    scores = {
        entry.epoch: entry.numbers.get(run.best_metric, math.nan)
        for entry in reversed(trained)
        if entry.test_set == first
    }
    finite = [epoch for epoch, score in scores.items() if math.isfinite(score)]
    best = max(finite, key=lambda epoch: (scores[epoch], -epoch), default=-1)
    last = max((entry.epoch for entry in run.evaluations), default=-1)
    for entry in sorted(run.evaluations, key=lambda entry: entry.epoch):
        if entry.epoch in (0, best, last):
            when = f"after epoch {entry.epoch}" if entry.epoch else "before training"
            when += f" (best by {run.best_metric})" if entry.epoch == best != last else ""
            numbers = {name: percent_text(value) for name, value in entry.numbers.items()}
            counts = _split_counts(run, entry.test_set)
            rows.append(ResultRow(entry.test_set, when, counts, numbers, entry.epoch == last))
    order = list(dict.fromkeys(entry.test_set for entry in run.evaluations))
    return sorted(rows, key=lambda row: order.index(row.test_set))


def _split_counts(run: RunFiles, test_set: str) -> tuple[str, str]:
    counts = {split.split: _count(split.images) for split in run.data if split.dataset == test_set}
    return counts.get("query", ""), counts.get("gallery", "")


def _findings(run: RunFiles) -> list[Finding]:
    train = [split for split in run.data if split.split == "train"]
    # Beside a source, the target comes last.
    cameras, identities = (train[-1].cameras or 0, train[-1].identities or 0) if train else (0, 0)
    found: list[Finding] = []
    for test_set in dict.fromkeys(entry.test_set for entry in run.evaluations):
        scores = [
            (entry.epoch, entry.numbers[run.best_metric])
            for entry in run.evaluations
            if entry.test_set == test_set and run.best_metric in entry.numbers
        ]
        found += course.judge_results(test_set, scores, run.best_metric)
    if run.clusterer is not None:
        epochs = [line.numbers for line in run.labels]
        data = health.SplitData(cameras, identities)
        found += health.judge_clusters(epochs, run.clusterer, data)
        split_known = any(numbers.get("cross-camera", 0) > 0 for numbers in epochs)
        if run.clusters and not split_known:
            found += health.judge_single_camera(*_single_camera(run.clusters))
    losses = [line.numbers["loss"] for line in run.training if "loss" in line.numbers]
    supervised = bool(run.settings) and run.clusterer is None
    found += course.judge_losses(losses, supervised, run.nonfinite)
    timed = [line.numbers for line in run.training if {"data_time", "step_time"} <= {*line.numbers}]
    found += course.judge_speed(
        [numbers["data_time"] for numbers in timed],
        [numbers["step_time"] for numbers in timed],
        whole_number(run.settings.get("DATALOADER.NUM_WORKERS")),
    )
    for details in run.details:
        found += course.judge_queries(details.test_set, details.precision)
        if details.cameras:
            found += course.judge_camera_pairs(details.test_set, *details.cameras)
    order = ("bad", "look", "good", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _single_camera(images: Sequence[ClusteredImage]) -> tuple[int, int, int]:
    """The numbers of clusters of one camera, of all clusters, and of cameras."""
    cameras: dict[int, set[str]] = {}
    for image in images:
        if image.cluster >= 0 and image.camera:
            cameras.setdefault(image.cluster, set()).add(image.camera)
    everywhere = {camera for found in cameras.values() for camera in found}
    return sum(len(found) == 1 for found in cameras.values()), len(cameras), len(everywhere)


def _matrix(test_set: str, pairs: CameraPairs) -> Matrix:
    rows = []
    shown = list(zip(pairs.query_cameras, pairs.precision, strict=True))[:_MOST_CAMERAS]
    for camera, values in shown:
        cells = [
            Cell("", None) if value is None or not math.isfinite(value)
            else Cell(f"{100 * value:.0f}", min(1.0, max(0.0, value)))
            for value in values[:_MOST_CAMERAS]
        ]  # fmt: skip
        rows.append((camera, cells))
    known = max(len(pairs.query_cameras), len(pairs.gallery_cameras))
    note = f"The first {_MOST_CAMERAS} of {known} cameras." if known > _MOST_CAMERAS else ""
    return Matrix(test_set, pairs.gallery_cameras[:_MOST_CAMERAS], rows, note)


def _epochs(run: RunFiles) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of labels by epoch; many epochs are thinned out evenly."""
    names = list(dict.fromkeys(name for line in run.labels for name in line.numbers))
    count = len(run.labels)
    chosen = range(count)
    if count > _MOST_ROWS:
        step = (count - 1) / (_MOST_ROWS - 1)
        places = [round(i * step) for i in range(_MOST_ROWS)]
        labels = [run.labels[place] for place in places]
    else:
        labels = [run.labels[place] for place in chosen]
    rows = [
        [
            str(line.epoch + 1),
            *(number_text(line.numbers[name]) if name in line.numbers else "" for name in names),
        ]
        for line in labels
    ]
    return ["epoch", *names], rows


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    rows = {name: value for name, value in run.log.environment if name}
    commit = commit_text(run.provenance)
    if commit:
        rows["code (git)"] = commit
    for name in ("date", "seed", "device", "processes", "python"):
        if name in run.provenance:
            rows.setdefault(name, str(run.provenance[name]))
    libraries = run.provenance.get("libraries")
    for name, version in (libraries if isinstance(libraries, dict) else {}).items():
        rows.setdefault(str(name), str(version))
    rows |= _times(run)
    return list(rows.items())


def _times(run: RunFiles) -> dict[str, str]:
    """How the run spent its time, as far as metrics.json shows it."""
    steps = waiting = 0.0
    before = 0
    for line in run.training:
        done = max(0, line.step - before)  # numbers are means over these steps
        before = line.step
        steps += done * line.numbers.get("step_time", 0.0)
        waiting += done * line.numbers.get("data_time", 0.0)
    seconds = {
        "time of steps": steps,
        "of it, waiting for images": waiting,
        "time of extraction": sum(line.numbers.get("extraction_time", 0.0) for line in run.labels),
        "time of labels": sum(line.numbers.get("label_time", 0.0) for line in run.labels),
    }
    return {name: _time_text(value) for name, value in seconds.items() if value > 0}


def _time_text(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _repeat(run: RunFiles) -> str:
    commit = run.provenance.get("git")
    lines = []
    if isinstance(commit, dict) and isinstance(commit.get("commit"), str):
        lines.append(f"git checkout {shlex.quote(commit['commit'])}")
    named = run.folder if run.folder.name not in ("", "..") else run.folder.resolve()
    return "\n".join([*lines, _train_command(run, f"{named}_again")])


def _train_command(run: RunFiles, output: str | Path, *options: str) -> str:
    processes = whole_number(run.provenance.get("processes")) or 1
    program = command("train_net", processes)
    config = str(run.folder / "config.yaml")
    return shlex.join([*program, "--config-file", config, *options, "OUTPUT_DIR", str(output)])


def _notes(run: RunFiles, budget: PictureBudget, cut: bool) -> dict[str, str]:
    """Says what is missing and why, by the section that would show it."""
    notes = dict.fromkeys(_NOTES, "")
    if not run.evaluations:
        notes["results"] = (
            "This run was not evaluated: it has no test set (DATASETS.TEST)."
            if run.finished
            else "This run was not evaluated before it ended."
        )
    elif not run.details:
        notes["details"] = (
            "Only the last evaluation has queries and cameras, and this run has not reached it."
            if not run.finished
            else "results.json has no details about queries and cameras."
        )
    if not run.settings:
        notes["settings"] = "config.yaml is missing: the settings are not known."
    elif cut:
        notes["settings"] = f"The first {_LONGEST_CONFIG:,} characters of config.yaml."
    if run.settings and run.clusterer is None:
        notes["clusters"] = "Labels are the identities: there are no clusters."
    elif not run.labels:
        notes["clusters"] = "metrics.json has no clusters: no epoch has begun."
    if not run.clusters and not notes["clusters"]:
        notes["clusters_csv"] = (
            "There is no clusters.csv: it is written at the end, which this run has not reached."
            if run.writes_clusters and not run.finished
            else "There is no clusters.csv: add WriteClusters to HOOKS, which clusters the images "
            "once more with the final model."
        )
    if budget.unread:
        path, reason = next(iter(budget.unread.items()))
        notes["images"] = (
            f"{len(budget.unread):,} images cannot be read here; the first: {reason or path}. "
            "Paths are relative to the folder where training ran: make the report there."
        )
    elif budget.left_out:
        notes["images"] = f"{budget.left_out:,} small pictures have no room on this page."
    return notes


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
