"""Reads a paper's tables from a file, and compares our numbers with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import kendalltau, spearmanr
from tabulate import tabulate

from reid.checking import ConfigError, from_mapping, nearest
from reid.shipped import find_shipped
from reid.yaml_text import read_yaml


@dataclass
class PaperDataset:
    """A data set of the tables.

    Attributes:
        label: Its name in the paper.
        beside: Another data set whose published numbers are shown beside ours; empty: this one.
        counts: Published counts, by `SPLIT cameras`, `SPLIT identities`, `SPLIT images`.
    """

    label: str
    beside: str = ""
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Method:
    """A method, shown in a row of a table.

    Attributes:
        label: Its name in the paper.
        configs: Config files of the method, relative to the tables' file; later ones win.
            `{dataset}` stands for the data set. Empty: the method is shown but not trained.
        published: By data set, percent in the order of `Paper.metrics`; None: not published.
        note: Why it is not trained.
    """

    label: str
    configs: list[str] = field(default_factory=list)
    published: dict[str, list[float | None]] = field(default_factory=dict)
    note: str = ""


@dataclass
class PaperTable:
    """A table of the paper.

    Attributes:
        title: The table's title.
        datasets: Data sets for which the paper shows this table.
        metrics: Its columns.
        rows: Key of a method -> its label in this table; empty label: the method's label. A table
            without rows counts images.
    """

    title: str
    datasets: list[str]
    metrics: list[str] = field(default_factory=list)
    rows: dict[str, str] = field(default_factory=dict)


@dataclass
class Paper:
    """A paper's tables, as `load_paper` reads them.

    Attributes:
        paper: The paper's name.
        data_config: Config of a data set; paths as in `Method.configs`.
        metrics: Names of all numbers, as the evaluator calls them.
        datasets: Data sets by key.
        methods: Methods by key.
        tables: Tables by number.
        folder: The folder of the file; set by `load_paper`.
    """

    paper: str
    data_config: str
    metrics: list[str]
    datasets: dict[str, PaperDataset]
    methods: dict[str, Method]
    tables: dict[int, PaperTable]
    folder: str = ""

    def table(self, number: int) -> PaperTable:
        """A table by number.

        Raises:
            ConfigError: There is no such table.
        """
        if number not in self.tables:
            known = ", ".join(map(str, self.tables))
            raise ConfigError(f"table: expected one of {known} of {self.paper}, got {number}")
        return self.tables[number]

    def published(self, method: str, dataset: str, metric: str) -> float | None:
        """The published number to show beside ours, in percent; None: not published."""
        numbers = self.methods[method].published.get(self.datasets[dataset].beside or dataset)
        return numbers[self.metrics.index(metric)] if numbers else None


def load_paper(path: Path) -> Paper:
    """Reads a YAML file of a paper's tables.

    Args:
        path: The file, or one that comes with the framework (see `reid.shipped.find_shipped`).

    Raises:
        ConfigError: The file is missing, or its content does not fit `Paper`.
    """
    path = find_shipped(path)
    try:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ConfigError(f"expected KEY: VALUE lines, got {content!r:.60}")
        paper = from_mapping(Paper, content, "")
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"tables file {str(path)!r} cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    paper.folder = str(path.parent)
    known, metrics = [*paper.datasets], len(paper.metrics)
    for key, dataset in paper.datasets.items():
        _check_known(
            f"{path}: datasets.{key}.beside", [dataset.beside] * bool(dataset.beside), known
        )
    for key, method in paper.methods.items():
        _check_known(f"{path}: methods.{key}.published", method.published, known)
        for name, numbers in method.published.items():
            if len(numbers) != metrics:
                raise ConfigError(
                    f"{path}: methods.{key}.published.{name}: expected {metrics} numbers, one for "
                    f"each of {', '.join(paper.metrics)}, got {numbers}"
                )
    for number, table in paper.tables.items():
        _check_known(f"{path}: tables.{number}.datasets", table.datasets, known)
        _check_known(f"{path}: tables.{number}.metrics", table.metrics, paper.metrics)
        _check_known(f"{path}: tables.{number}.rows", table.rows, [*paper.methods])
    return paper


def _check_known(
    where: str, names: Sequence[str] | Mapping[str, Any], known: Sequence[str]
) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{where}: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}"
            )


def compare_results(
    paper: Paper,
    number: int,
    dataset: str,
    rows: Sequence[str],
    results: Mapping[str, Mapping[int, Mapping[str, float] | None]],
    notes: Mapping[str, str],
) -> dict[str, Any]:
    """Compares our numbers with the published ones, all in percent, ready for JSON.

    Args:
        paper: The published numbers.
        number: The table's number.
        dataset: Key of the data set of our numbers.
        rows: Methods to show, in the table's order.
        results: The evaluator's numbers (0 to 1) by method and seed; None: not finished. Methods
            that are not trained are missing.
        notes: Why a method lacks numbers, by method.

    Returns:
        `rows`: for each metric, `values` (one per seed), their `mean`, the sample standard
        deviation `std` (divided by n - 1; None for one seed), `paper`, and `difference` (None if
        the paper used another data set). `order`: for each metric, how many `pairs` of rows both we
        and the paper have, without the paper's ties; how many of these `agree`; and two rank
        correlations of our means with the paper's numbers, Kendall's tau-b and Spearman's rho (1:
        the same order, -1: the reverse; None if all our numbers are equal).

    Raises:
        ConfigError: The evaluator does not compute a metric of the table.
    """
    table, beside = paper.table(number), paper.datasets[dataset].beside
    body = []
    for row in rows:
        finished = {seed: numbers for seed, numbers in results.get(row, {}).items() if numbers}
        _check_metrics(f"table {number}, {row}", table.metrics, finished.values())
        body.append(
            {
                "row": row,
                "label": table.rows[row] or paper.methods[row].label,
                "seeds": [*results.get(row, {})],
                "finished_seeds": [*finished],
                "note": notes.get(row, ""),
                "metrics": {
                    metric: _compare_values(
                        [100 * numbers[metric] for numbers in finished.values()],
                        paper.published(row, dataset, metric),
                        same_dataset=not beside,
                    )
                    for metric in table.metrics
                },
            }
        )
    return {
        "paper": paper.paper,
        "table": number,
        "title": table.title,
        "dataset": paper.datasets[dataset].label,
        "published_on": paper.datasets[beside or dataset].label,
        "rows": body,
        "order": {metric: _compare_order(body, metric) for metric in table.metrics},
    }


def _check_metrics(
    where: str, metrics: Sequence[str], found: Iterable[Mapping[str, float]]
) -> None:
    for numbers in found:
        for metric in metrics:
            if metric not in numbers:
                raise ConfigError(
                    f"{where}: expected {metric} among the evaluator's numbers, "
                    f"got {', '.join(numbers)}"
                )


def _compare_values(
    values: Sequence[float], published: float | None, *, same_dataset: bool
) -> dict[str, Any]:
    """Compares one metric of a row; the difference needs a number on the same data set."""
    mean = statistics.fmean(values) if values else None
    return {
        "values": values,
        "mean": mean,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "paper": published,
        "difference": None
        if mean is None or published is None or not same_dataset
        else mean - published,
    }


def _compare_order(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    """Compares our order of the rows with the paper's; None for fewer than two rows."""
    cells = [row["metrics"][metric] for row in rows]
    numbers = [
        (cell["paper"], cell["mean"]) for cell in cells if None not in (cell["paper"], cell["mean"])
    ]
    ordered = [
        (a[0] - b[0]) * (a[1] - b[1]) > 0
        for i, a in enumerate(numbers)
        for b in numbers[i + 1 :]
        if a[0] != b[0]
    ]
    if not ordered:
        return None
    equal = len({ours for _, ours in numbers}) == 1
    paper, ours = zip(*numbers, strict=True)
    return {
        "rows": len(numbers),
        "pairs": len(ordered),
        "agree": sum(ordered),
        "kendall_tau": None if equal else float(kendalltau(paper, ours).statistic),
        "spearman_rho": None if equal else float(spearmanr(paper, ours).statistic),
    }


def results_text(comparison: Mapping[str, Any], tablefmt: str = "simple") -> str:
    """Formats a comparison as text.

    Args:
        comparison: The result of `compare_results`.
        tablefmt: tabulate's table format; `github` for Markdown.
    """
    same = comparison["dataset"] == comparison["published_on"]
    metrics = [*comparison["order"]]
    headers = ["row"]
    for metric in metrics:
        headers += [metric, "paper", "diff"] if same else [metric, "paper"]
    body = []
    for row in comparison["rows"]:
        line = [row["label"]]
        for metric in metrics:
            cell = row["metrics"][metric]
            spread = f" ± {cell['std']:.1f}" if cell["std"] is not None else ""
            line += [_number(cell["mean"]) + spread, _number(cell["paper"])]
            line += [_number(cell["difference"], "+.1f")] if same else []
        seeds = f"{len(row['finished_seeds'])}/{len(row['seeds'])}" if row["seeds"] else "-"
        body.append([*line, seeds, row["note"]])
    headers += ["seeds", "note"]
    if not any(line[-1] for line in body):
        headers, body = headers[:-1], [line[:-1] for line in body]
    about = "Percent, after the last epoch; seeds: finished / planned."
    if any(
        cell["std"] is not None for row in comparison["rows"] for cell in row["metrics"].values()
    ):
        about += " Mean ± sample standard deviation (n - 1) over the seeds."
    if not all(row["seeds"] for row in comparison["rows"]):
        about += " Rows without seeds have no config here."
    if not same:
        about += (
            f" The paper's numbers are those on {comparison['published_on']}: another data set, so "
            "only the order of the rows can be compared."
        )
    orders = [_order_text(metric, order) for metric, order in comparison["order"].items()]
    title = "Table {table} of {paper} on {dataset}: {title}".format(**comparison)
    return _page(title, headers, body, [about, *filter(None, orders)], tablefmt)


def _order_text(metric: str, order: Mapping[str, Any] | None) -> str:
    if order is None:
        return ""
    tau, rho = (_number(order[name], ".2f") for name in ("kendall_tau", "spearman_rho"))
    return (
        f"{metric}: {order['agree']} of {order['pairs']} pairs of the {order['rows']} rows that "
        f"have both numbers are in the paper's order (Kendall's tau-b {tau}, Spearman's rho {rho}; "
        "1 = the same order, -1 = the reverse, - = all ours are equal)."
    )


def counts_text(counts: Mapping[str, Any], tablefmt: str = "simple") -> str:
    """Formats the result of `reid.workflows.reproduce.count_data`; see `results_text`."""
    body = [
        [name, f"{pair['found']:,}", "-" if pair["paper"] is None else f"{pair['paper']:,}"]
        for name, pair in counts["counts"].items()
    ]
    title = "Table {table} of {paper} on {dataset}: {title}".format(**counts)
    about = "Junk images (identity -1) are not counted; distractors (identity 0) count as one."
    return _page(title, ["", "found", "paper"], body, [about], tablefmt)


def _page(
    title: str,
    headers: Sequence[str],
    body: Sequence[Sequence[str]],
    lines: Sequence[str],
    tablefmt: str,
) -> str:
    aligns = ["left" if name in ("", "row", "note") else "right" for name in headers]
    table = tabulate(
        body, headers=headers, tablefmt=tablefmt, colalign=aligns, disable_numparse=True
    )
    gap = "\n\n" if tablefmt == "github" else "\n"
    return "\n\n".join((title, table, gap.join(lines)))


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else f"{value:{form}}"
