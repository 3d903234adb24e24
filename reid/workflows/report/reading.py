"""Reads the files of a run; sentences describe files that are missing or broken."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from reid.engine.hooks.checkpoints import FINAL_MODEL
from reid.registry import shortened
from reid.structures import DataError
from reid.workflows.report.run_files import (
    CameraPairs,
    ClusteredImage,
    Details,
    Evaluation,
    HardQuery,
    MatchedPair,
    MetricLine,
    Numbers,
    RunFiles,
    number,
    sequence,
    whole_number,
)
from reid.yaml_text import parse_yaml

FILES = ("config.yaml", "metrics.json", "results.json", "log.txt", "clusters.csv", "matches.csv")
"""The files of a run that are read, besides `PICTURES`."""
PICTURES = ("ranked_lists.png", "similarities.png", "clusters.png", "matches.png")
_NONFINITE = "nonfinite_*.json"
_MOST_BYTES = 2**28  # of a text file
_MOST_WARNINGS = 30
_MOST_FACTS = 40  # of the environment
_LONGEST = 2000  # characters of a warning
_LOG_LINE = re.compile(r"\d\d-\d\d \d\d:\d\d:\d\d  (.*)", re.DOTALL)


def read_run(folder: Path) -> RunFiles:
    """Reads everything that a report shows about a run. Nothing in the files is executed.

    Args:
        folder: The run's folder.

    Raises:
        DataError: The folder does not exist, or it has none of the files of a run.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; expected the output folder of a run")
    if not any((folder / name).is_file() for name in FILES):
        raise DataError(
            f"{folder}: has none of {', '.join(FILES)}; expected the output folder of a run"
        )
    run = RunFiles(folder, folder.resolve().name or str(folder))
    run.pictures = {name: folder / name for name in PICTURES if (folder / name).is_file()}
    run.nonfinite = sum(1 for _ in folder.glob(_NONFINITE))
    run.has_final_weights = (folder / FINAL_MODEL).is_file()
    readers: dict[str, Callable[[RunFiles, str], None]] = {
        "config.yaml": _read_config,
        "metrics.json": _read_metrics,
        "results.json": _read_results,
        "log.txt": _read_log,
        "clusters.csv": _read_clusters,
        "matches.csv": _read_matches,
    }
    for name, read in readers.items():
        if not (folder / name).is_file():
            continue
        try:
            read(run, _text(folder / name))
        # RecursionError: values that are nested thousands of levels deep
        except (OSError, ValueError, RecursionError, yaml.YAMLError, csv.Error) as error:
            run.problems.append(f"{name} cannot be read: {shortened(str(error))}")
    return run


def flattened(tree: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields nested settings as (dotted upper-case key, value), as on a command line.

    Each item of a list of parts has a key (`CRITERION.0.NAME`). A bare name becomes a part with
    only its NAME.
    """
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flattened(value, f"{prefix}{str(key).upper()}.")
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for place, item in enumerate(tree):
            part = {"NAME": item} if isinstance(item, str) else item
            yield from flattened(part, f"{prefix}{place}.")
    else:
        yield prefix.rstrip("."), tree


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"its {path.stat().st_size:,} bytes are too many")
    return path.read_text("utf-8", errors="surrogateescape")


def _read_config(run: RunFiles, text: str) -> None:
    run.config_text = text
    tree = parse_yaml(text)
    if not isinstance(tree, Mapping):
        raise ValueError(f"expected KEY: VALUE lines, got {type(tree).__name__}")
    run.settings = dict(flattened(tree))
    clusterer = run.settings.get("CLUSTERER")
    if isinstance(clusterer, str):
        run.settings["CLUSTERER.NAME"] = run.settings.pop("CLUSTERER")


def _read_metrics(run: RunFiles, text: str) -> None:
    broken = 0
    for line in text.split("\n"):
        if not line:
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            broken += 1  # perhaps the last line of a killed run
            continue
        content = value if isinstance(value, dict) else {}
        step, epoch = whole_number(content.get("step")), whole_number(content.get("epoch"))
        numbers = _numbers(content)
        kind = content.get("kind")
        if step is None or epoch is None or kind not in ("labels", "train", "test"):
            broken += 1
        elif kind == "test":
            by_set: dict[str, Numbers] = {}
            for name, value in numbers.items():
                test_set, _, metric = name.rpartition("/")
                by_set.setdefault(test_set, {})[metric] = value
            run.evaluations += [Evaluation(name, epoch, found) for name, found in by_set.items()]
        else:
            lines = run.labels if kind == "labels" else run.training
            lines.append(MetricLine(step, epoch, numbers))
    if broken:
        run.problems.append(f"metrics.json: {broken:,} lines are cut off or of no known kind")


def _read_results(run: RunFiles, text: str) -> None:
    results = json.loads(text)
    if not isinstance(results, dict):
        raise ValueError(f"expected an object, got {type(results).__name__}")
    history = [_evaluation(entry) for entry in sequence(results.get("history"))]
    known = [entry for entry in history if entry is not None]
    if len(known) >= len(run.evaluations):  # else the run was resumed after this file was written
        run.evaluations = known
    metric = str(results.get("best_chosen_by", "")).partition(" on the test set ")[0]
    run.best_metric = metric or run.best_metric
    for entry in sequence(results.get("final")):
        if isinstance(entry, dict) and isinstance(entry.get("test_set"), str):
            run.details.append(_details(entry))
    provenance = results.get("provenance")
    run.provenance = provenance if isinstance(provenance, dict) else {}


def _evaluation(entry: object) -> Evaluation | None:
    if not isinstance(entry, dict):
        return None
    name, epoch = entry.get("test_set"), whole_number(entry.get("epoch"))
    numbers = entry.get("numbers")
    if not isinstance(name, str) or epoch is None or not isinstance(numbers, dict):
        return None
    return Evaluation(name, epoch, _numbers(numbers))


def _details(entry: Mapping[str, Any]) -> Details:
    precision = [number(value) for value in sequence(entry.get("per_query_AP"))]
    paths = sequence(entry.get("hardest_query_paths"))
    hardest = []
    for place, row in enumerate(map(whole_number, sequence(entry.get("hardest_queries")))):
        if row is not None:
            path = paths[place] if place < len(paths) else ""
            known = precision[row] if 0 <= row < len(precision) else None
            hardest.append(HardQuery(row, path if isinstance(path, str) else "", known))
    matched = [value for value in precision if value is not None and value == value]
    cameras = _camera_pairs(entry.get("camera_pairs"))
    return Details(entry["test_set"], whole_number(entry.get("epoch")), matched, hardest, cameras)


def _camera_pairs(pairs: object) -> CameraPairs | None:
    if not isinstance(pairs, dict):
        return None
    cameras = [
        [whole_number(camid) for camid in sequence(pairs.get(name))]
        for name in ("query_cameras", "gallery_cameras")
    ]
    query, gallery = ([camid for camid in row if camid is not None] for row in cameras)
    table = [[number(value) for value in sequence(row)] for row in sequence(pairs.get("mAP"))]
    fits = len(table) == len(query) and all(len(row) == len(gallery) for row in table)
    return CameraPairs(query, gallery, table) if fits and query and gallery else None


def _read_log(run: RunFiles, text: str) -> None:
    records: list[str] = []
    for line in text.split("\n"):
        match = _LOG_LINE.fullmatch(line)
        if match:
            records.append(match[1])
        elif records:
            records[-1] += f"\n{line}"
    starts = [place for place, record in enumerate(records) if record.startswith("Environment\n")]
    sessions = [
        records[start:end] for start, end in zip(starts, [*starts[1:], len(records)], strict=True)
    ]
    # Evaluations of a model may be logged here too; they log no config.
    training = [part for part in sessions if any(line.startswith("Config\n") for line in part)]
    if not training:
        return
    for line in training[-1][0].splitlines()[1 : _MOST_FACTS + 1]:
        name, _, value = line.partition("  ")
        run.log.environment.append((name.strip(), value.strip()))
    run.log.stopped = next(
        (
            record.partition("stopped by ")[2]
            for record in reversed(training[-1])
            if record.startswith("ERROR: stopped by ")
        ),
        "",
    )
    first = max(
        place
        for place, part in enumerate(training)
        if place == 0 or not any(line.startswith("Resumed from ") for line in part)
    )
    for record in (record for part in training[first:] for record in part):
        if record.startswith(("WARNING: ", "ERROR: ")):
            told = record[:_LONGEST]
            run.log.warnings[told] = run.log.warnings.pop(told, 0) + 1
    last = islice(reversed(run.log.warnings.items()), _MOST_WARNINGS)
    run.log.warnings = dict(reversed(list(last)))


def _read_clusters(run: RunFiles, text: str) -> None:
    broken = 0
    for row in _rows(text, ("path", "cluster", "camera", "confidence")):
        try:
            confidence = float(row["confidence"]) if row["confidence"] else None
            image = ClusteredImage(row["path"], int(row["cluster"]), row["camera"], confidence)
        except (ValueError, TypeError, KeyError):
            broken += 1
        else:
            run.clusters.append(image)
    if broken:
        run.problems.append(f"clusters.csv: {broken:,} lines are broken")


def _read_matches(run: RunFiles, text: str) -> None:
    broken = 0
    header = ("path", "other_path", "camera", "other_camera", "similarity", "cluster")
    for row in _rows(text, header):
        try:
            similarity = float(row["similarity"])
            one, other, camera, other_camera = (row[name] or "" for name in header[:4])
            pair = MatchedPair(one, other, camera, other_camera, similarity, row["cluster"] or "")
        except (ValueError, TypeError, KeyError):
            broken += 1
        else:
            run.matches.append(pair)
    if broken:
        run.problems.append(f"matches.csv: {broken:,} lines are broken")


def _rows(text: str, header: tuple[str, ...]) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = reader.fieldnames or []
    if not set(header) <= set(names):
        raise ValueError(f"expected the columns {', '.join(header)}, got {', '.join(names)}")
    yield from reader


def _numbers(content: Mapping[str, Any]) -> Numbers:
    found = {name: number(value) for name, value in content.items()}
    return {
        name: value
        for name, value in found.items()
        if value is not None and name not in ("step", "epoch")
    }
