"""Reproduces a paper's tables: trains rows, skips finished runs, resumes interrupted ones."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reid.assembly.data import build_dataset
from reid.assembly.plugins import register_parts
from reid.assembly.provenance import BOOKKEEPING
from reid.config import Config, config_differences, load_config
from reid.data.datasets.base import Split, SplitCounts
from reid.engine.hooks.checkpoints import checkpoint_paths, epoch_of
from reid.engine.stopping import TimeIsUp
from reid.files import InputError, read_json, write_text
from reid.registry import ConfigError, nearest
from reid.structures import DataError
from reid.workflows.comparison import Paper, compare_results, counts_text, results_text
from reid.workflows.errors import USER_ERRORS
from reid.workflows.train import train


@dataclass(frozen=True)
class Run:
    """One training run: a row of a table with a seed.

    Attributes:
        row: Key of the method.
        config: The run's config, with its seed and output folder.
    """

    row: str
    config: Config

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.config.output_dir)

    @property
    def can_resume(self) -> bool:
        """Whether the folder has a checkpoint to resume from."""
        return bool(checkpoint_paths(self.folder))

    @property
    def progress(self) -> str:
        """The run's row and seed, and how far it is."""
        there = checkpoint_paths(self.folder)
        at = f"after epoch {epoch_of(there[0])} of {self.config.solver.max_epochs}" if there else ""
        return f"{self.row}/seed{self.config.seed} ({at or 'not begun'})"

    def numbers(self) -> dict[str, float] | None:
        """The evaluator's numbers on the first test set after the last epoch; None: not finished.

        Raises:
            ConfigError: results.json does not hold the results of a run.
        """
        path = self.folder / "results.json"
        if not path.exists():
            return None
        try:
            final = read_json(path)["final"][0]
            numbers = {str(name): float(value) for name, value in final["numbers"].items()}
            return numbers if final["epoch"] == self.config.solver.max_epochs else None
        except (InputError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}: expected the results of a run ({error!r}); remove the file"
            ) from error


def reproduce(
    paper: Paper,
    number: int,
    dataset: str,
    output_dir: Path,
    *,
    seeds: int = 1,
    rows: Sequence[str] = (),
    overrides: Sequence[str] = (),
    report_only: bool = False,
    deadline: float = math.inf,
    say: Callable[[str], None],
) -> bool:
    """Trains the rows of a table on a data set and compares our numbers with the paper's.

    All tables share the runs in OUTPUT/DATASET/ROW/seedS. A finished run is not trained again, an
    interrupted one resumes from its checkpoint, and a row that fails does not stop the others. All
    rows get their first seed before any gets its second, so that a whole table is ready early. The
    table goes to `say` and to OUTPUT/DATASET/table_N.txt, .md and .json.

    Args:
        paper: The tables.
        number: The table's number; for a table without rows, the data set's images are counted.
        dataset: Key of the data set.
        output_dir: OUTPUT.
        seeds: Number of seeds: the config's seed and those that follow it.
        rows: Keys of the rows; empty: all rows that have configs for this data set.
        overrides: `KEY VALUE` pairs for every row.
        report_only: Train nothing; show the finished runs.
        deadline: After this time of `time.monotonic`, no run begins, and the running one ends with
            its next whole epoch.
        say: Gets messages about the progress.

    Returns:
        Whether all rows succeeded.

    Raises:
        ConfigError: An argument or a config is wrong, or a folder holds a run of another config.
            This is checked before any training.
        TimeIsUp: The deadline has passed; the message names the runs that are left. The table of
            the finished runs is written.
    """
    table = paper.table(number)
    _check_arguments(paper, dataset, seeds)
    report = output_dir / dataset / f"table_{number}"
    if not table.rows:
        return _report_counts(paper, number, dataset, overrides, report, say)
    _check_rows(paper, number, dataset, rows)
    shown = [row for row in table.rows if not rows or row in rows]
    runs, notes = plan_runs(paper, shown, dataset, output_dir / dataset, seeds, overrides)
    failures, left = _train_all([] if report_only else runs, deadline, say)
    for run, _ in failures:
        notes[run.row] = f"seed {run.config.seed} failed"
    results: dict[str, dict[int, dict[str, float] | None]] = {}
    for run in runs:
        results.setdefault(run.row, {})[run.config.seed] = run.numbers()
    comparison = compare_results(paper, number, dataset, shown, results, notes)
    _write_report(comparison, results_text, report, say)
    for run, failure in failures:
        say(f"{run.folder} failed: {failure}")
    if left:
        names = ", ".join(run.progress for run in left)
        raise TimeIsUp(f"{dataset}: {len(left)} of {len(runs)} runs are left: {names}")
    return not failures


def _check_arguments(paper: Paper, dataset: str, seeds: int) -> None:
    """Raises ConfigError if an argument of `reproduce` is wrong."""
    if dataset not in paper.datasets:
        known = [*paper.datasets]
        raise ConfigError(
            f"dataset: expected one of {', '.join(known)}, got {dataset!r}{nearest(dataset, known)}"
        )
    if seeds < 1:
        raise ConfigError(f"seeds: expected 1 or more, got {seeds}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "expected one process, not torchrun; to use several GPUs, start this tool once per GPU "
            "with some of the rows (--rows, DEVICE cuda:N), then once with --report-only"
        )


def _check_rows(paper: Paper, number: int, dataset: str, rows: Sequence[str]) -> None:
    """Raises ConfigError if a row is not in the table or has no config."""
    known = [*paper.table(number).rows]
    for row in rows:
        if row not in known:
            raise ConfigError(
                f"rows: table {number} has {', '.join(known)}, got {row!r}{nearest(row, known)}"
            )
        files, why_not = _config_files(paper, row, dataset)
        if not files:
            raise ConfigError(f"rows: {row} cannot be trained: {why_not}")


def plan_runs(
    paper: Paper,
    rows: Sequence[str],
    dataset: str,
    folder: Path,
    seeds: int,
    overrides: Sequence[str] = (),
) -> tuple[list[Run], dict[str, str]]:
    """Plans the runs of some rows, and checks them against the runs in their folders.

    Returns:
        The runs, ordered by seed, so that the first complete table is ready early. And why a row
        has no run, by row.

    Raises:
        ConfigError: A config is wrong, or folders hold runs of other configs; the message names
            all of them.
    """
    for key in overrides[::2]:
        if key.upper() in ("OUTPUT_DIR", "SEED"):
            raise ConfigError(f"{key}: the table sets it; use --output-dir or --seeds instead")
    configs, notes = {}, {}
    for row in rows:
        files, why_not = _config_files(paper, row, dataset)
        if files:
            configs[row] = load_config(files, overrides)
        else:
            notes[row] = why_not
    runs = [
        Run(
            row,
            replace(
                config,
                seed=config.seed + step,
                output_dir=str(folder / row / f"seed{config.seed + step}"),
            ),
        )
        for step in range(seeds)
        for row, config in configs.items()
    ]
    changed = [text for run in runs for text in _changes(run)]
    if changed:
        raise ConfigError(
            "the folders hold runs of another config; choose another --output-dir, give the same "
            "settings, or remove the folders:\n" + "\n".join(changed)
        )
    return runs, notes


def count_data(
    paper: Paper, number: int, dataset: str, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Counts the images of a data set and adds the published counts, ready for JSON.

    Junk images (identity -1) are not counted, as in the papers.

    Raises:
        ConfigError: The data set's config is wrong.
        DataError: The images are not what was expected.
    """
    config = load_config(_file(paper, paper.data_config, dataset), overrides)
    register_parts(config)
    images = build_dataset(config.datasets.train, "datasets.train")
    splits: tuple[Split, ...] = ("train", "query", "gallery")
    found = {}
    for split in splits:
        counts = SplitCounts.of([record for record in images.load(split) if record.pid >= 0])
        for name in ("cameras", "identities", "images"):
            found[f"{split} {name}"] = getattr(counts, name)
    published = paper.datasets[dataset].counts
    return {
        "paper": paper.paper,
        "table": number,
        "title": paper.table(number).title,
        "dataset": paper.datasets[dataset].label,
        "counts": {
            name: {"found": count, "paper": published.get(name)}
            for name, count in found.items()
            if name in published or not published
        },
    }


def _report_counts(
    paper: Paper,
    number: int,
    dataset: str,
    overrides: Sequence[str],
    report: Path,
    say: Callable[[str], None],
) -> bool:
    try:
        counts = count_data(paper, number, dataset, overrides)
    except DataError as error:
        say(f"{dataset} failed: DataError: {error}")
        return False
    _write_report(counts, counts_text, report, say)
    return True


def _write_report(
    content: Mapping[str, Any], text: Callable[..., str], path: Path, say: Callable[[str], None]
) -> None:
    write_text(path.with_suffix(".txt"), text(content) + "\n")
    write_text(path.with_suffix(".md"), text(content, "github") + "\n")
    write_text(path.with_suffix(".json"), json.dumps(content, indent=2) + "\n")
    say(f"\n{text(content)}\n\nWritten to {path}.txt, .md and .json")


def _train_all(
    runs: Sequence[Run], deadline: float, say: Callable[[str], None]
) -> tuple[list[tuple[Run, str]], list[Run]]:
    """Trains runs until the deadline; returns those that failed, with their errors, and the rest.

    Args:
        runs: In this order; finished ones are skipped.
        deadline: See `reproduce`.
        say: Gets messages about the progress.
    """
    failures, left = [], []
    for place, run in enumerate(runs, 1):
        name = f"[{place}/{len(runs)}] {run.folder}"
        if run.numbers() is not None:
            say(f"{name}: finished already")
            continue
        if time.monotonic() >= deadline:
            left.append(run)
            continue
        say(f"{name}: {'goes on' if run.can_resume else 'starts'}")
        try:
            failure = _train_run(run, deadline)
        except TimeIsUp:
            say(f"{name}: the time is over, {run.progress}")
            left.append(run)
            continue
        if failure:
            say(f"{name}: {failure}")
            failures.append((run, failure))
    return failures, left


def _train_run(run: Run, deadline: float) -> str:
    """Trains a run, or its remaining epochs; returns the error, or nothing if it succeeded.

    Raises:
        TimeIsUp: The deadline ended the run.
    """
    try:
        train(run.config, resume=run.can_resume, deadline=deadline)
    except TimeIsUp:
        raise
    except USER_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 (whatever it is, the other rows can still be trained)
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    if run.numbers() is None:
        return "no results: the data set has no query and gallery"
    return ""


def _config_files(paper: Paper, row: str, dataset: str) -> tuple[list[Path], str]:
    """The config files of a row on a data set; if there are none, also the reason."""
    method = paper.methods[row]
    for config in method.configs:
        if "{dataset}" in config and not _file(paper, config, dataset).is_file():
            return [], f"no config for {dataset}"
    files = [_file(paper, config, dataset) for config in method.configs]
    if files:
        return files, ""
    return [], f"published numbers only{': ' if method.note else ''}{method.note}"


def _file(paper: Paper, config: str, dataset: str) -> Path:
    return Path(paper.folder) / config.replace("{dataset}", dataset)


def _changes(run: Run) -> Iterator[str]:
    """Describes how the config of the run in the folder differs; nothing if there is no run."""
    written = run.folder / "config.yaml"
    if not written.is_file():
        if run.can_resume or (run.folder / "results.json").exists():
            yield f"  {run.folder}: has no config.yaml, so its settings are unknown"
        return
    differences = [
        f"{key} {old} there, {new} now"
        for key, (old, new) in config_differences(load_config(written), run.config).items()
        if key not in BOOKKEEPING
    ]
    if differences:
        yield f"  {run.folder}: {'; '.join(differences)}"
