"""A paper's tables anew: trains the rows, skips finished ones, resumes broken ones."""

from __future__ import annotations

import json
import os
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
from reid.engine.hooks.checkpoints import checkpoint_paths
from reid.files import InputError, read_json, write_text
from reid.registry import ConfigError, nearest
from reid.structures import DataError
from reid.workflows.comparison import Paper, compare_results, counts_text, results_text
from reid.workflows.errors import USER_ERRORS
from reid.workflows.train import train


@dataclass(frozen=True)
class Run:
    """One training: a row with a seed.

    Attributes:
        row: Key of the method.
        config: With its seed and its folder.
    """

    row: str
    config: Config

    @property
    def folder(self) -> Path:
        """Where the run is, or will be."""
        return Path(self.config.output_dir)

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(checkpoint_paths(self.folder))

    def numbers(self) -> dict[str, float] | None:
        """The evaluator's numbers after the last epoch, of the first test set; None: unfinished.

        Raises:
            ConfigError: results.json is no results file.
        """
        path = self.folder / "results.json"
        if not path.exists():
            return None
        try:
            final = read_json(path)["final"][0]
            numbers = {str(name): float(value) for name, value in final["numbers"].items()}
            return numbers if final["epoch"] == self.config.solver.max_epochs else None
        except (InputError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not the results of a run ({error!r}); remove it") from error


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
    say: Callable[[str], None],
) -> bool:
    """Trains a table's rows on a data set and sets our numbers beside the paper's.

    A row's run lies in OUTPUT/DATASET/ROW/seedS, whatever table shows it, so that tables share
    runs. A finished run is not trained again, and a broken one goes on from its checkpoint. A row
    that fails does not stop the others. The table is said, and written to
    OUTPUT/DATASET/table_N.txt, .md and .json.

    Args:
        paper: The tables.
        number: Which of them; one without rows counts the data set's images instead.
        dataset: Key of the data set.
        output_dir: OUTPUT.
        seeds: How many: the config's, and those after it.
        rows: Keys of the rows; empty: all that have configs for this data set.
        overrides: `KEY VALUE` pairs for every row.
        report_only: Train nothing; show what is finished.
        say: Told what happens.

    Returns:
        Whether nothing failed.

    Raises:
        ConfigError: An argument or a config is wrong, or a folder holds a run of another config;
            found before anything is trained.
    """
    table = paper.table(number)
    _check_arguments(paper, dataset, seeds)
    report = output_dir / dataset / f"table_{number}"
    if not table.rows:
        return _report_counts(paper, number, dataset, overrides, report, say)
    _check_rows(paper, number, dataset, rows)
    shown = [row for row in table.rows if not rows or row in rows]
    runs, notes = plan_runs(paper, shown, dataset, output_dir / dataset, seeds, overrides)
    failures: list[tuple[Run, str]] = []
    for place, run in enumerate([] if report_only else runs, 1):
        failure = _train_run(run, f"[{place}/{len(runs)}]", say)
        if failure:
            failures.append((run, failure))
            notes[run.row] = f"seed {run.config.seed} failed"
    results: dict[str, dict[int, dict[str, float] | None]] = {}
    for run in runs:
        results.setdefault(run.row, {})[run.config.seed] = run.numbers()
    comparison = compare_results(paper, number, dataset, shown, results, notes)
    _write_report(comparison, results_text, report, say)
    for run, failure in failures:
        say(f"{run.folder} failed: {failure}")
    return not failures


def _check_arguments(paper: Paper, dataset: str, seeds: int) -> None:
    """Raises ConfigError where `reproduce` cannot begin."""
    if dataset not in paper.datasets:
        known = [*paper.datasets]
        raise ConfigError(
            f"dataset: expected one of {', '.join(known)}, got {dataset!r}{nearest(dataset, known)}"
        )
    if seeds < 1:
        raise ConfigError(f"seeds: expected 1 or more, got {seeds}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a table is trained by one process; with several GPUs start one for each share of the "
            "rows (--rows, DEVICE cuda:N), then --report-only"
        )


def _check_rows(paper: Paper, number: int, dataset: str, rows: Sequence[str]) -> None:
    """Raises ConfigError where a row that was asked for is not in the table or has no config."""
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
    """The trainings of some rows, checked against what their folders hold.

    Returns:
        The runs, seed after seed so that a first table is soon there; and why a row has none.

    Raises:
        ConfigError: A config is wrong, or folders hold runs of other configs; all are named.
    """
    for key in overrides[::2]:
        if key.upper() in ("OUTPUT_DIR", "SEED"):
            raise ConfigError(f"{key}: set by the table; use --output-dir, --seeds")
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
            "runs of another config are in the way; take another --output-dir, give the same "
            "settings, or remove the folders:\n" + "\n".join(changed)
        )
    return runs, notes


def count_data(
    paper: Paper, number: int, dataset: str, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Counts the images of a data set, beside the published counts, ready for JSON.

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


def _train_run(run: Run, place: str, say: Callable[[str], None]) -> str:
    """Trains what is left of a run; returns what went wrong, or nothing."""
    if run.numbers() is not None:
        say(f"{place} {run.folder}: finished already")
        return ""
    say(f"{place} {run.folder}: {'goes on' if run.can_resume else 'starts'}")
    try:
        train(run.config, resume=run.can_resume)
    except USER_ERRORS as error:
        failure = f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 (whatever it is, the other rows can still be trained)
        failure = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    else:
        if run.numbers() is not None:
            return ""
        failure = "no results: the data set has no query and gallery"
    say(f"{place} {run.folder}: {failure}")
    return failure


def _config_files(paper: Paper, row: str, dataset: str) -> tuple[list[Path], str]:
    """The config files of a row on a data set; or none, and why."""
    method = paper.methods[row]
    for config in method.configs:
        if "{dataset}" in config and not _file(paper, config, dataset).is_file():
            return [], f"no config for {dataset}"
    files = [_file(paper, config, dataset) for config in method.configs]
    return files, "" if files else "published numbers only"


def _file(paper: Paper, config: str, dataset: str) -> Path:
    return Path(paper.folder) / config.replace("{dataset}", dataset)


def _changes(run: Run) -> Iterator[str]:
    """What the config of the run in the folder has otherwise; nothing where there is no run."""
    written = run.folder / "config.yaml"
    if not written.is_file():
        if run.can_resume or (run.folder / "results.json").exists():
            yield f"  {run.folder}: has no config.yaml, so that nobody knows what was trained"
        return
    differences = [
        f"{key} {old} there, {new} now"
        for key, (old, new) in config_differences(load_config(written), run.config).items()
        if key not in BOOKKEEPING
    ]
    if differences:
        yield f"  {run.folder}: {'; '.join(differences)}"
