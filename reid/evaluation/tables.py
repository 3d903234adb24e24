"""The results of runs and evaluations as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from reid.evaluation.relevance import Counts

_NO_COUNTS: Mapping[str, Counts] = {}


def best_evaluation(
    history: Sequence[Mapping[str, Any]], metric: str, test_sets: Sequence[str]
) -> Mapping[str, Any] | None:
    """The best evaluation of trained weights; of equal ones the earliest.

    Args:
        history: `test_set`, `epoch` and `numbers` of evaluations.
        metric: Name of the number that decides.
        test_sets: Names in order; the first test set that has this number decides.

    Returns:
        An entry of the history; None if no evaluation has the number.
    """
    known = [entry for entry in history if metric in entry["numbers"]]
    for name in test_sets:
        of_set = [entry for entry in known if entry["test_set"] == name]
        trained = [entry for entry in of_set if entry["epoch"]] or of_set
        if trained:
            return max(trained, key=lambda entry: entry["numbers"][metric])
    return None


def summary_table(
    history: Sequence[Mapping[str, Any]],
    metric: str,
    test_sets: Sequence[str],
    counts: Mapping[str, Counts] = _NO_COUNTS,
    source_end: int | None = None,
) -> str:
    """The results of a training run: before it, at the best epoch, and at the end.

    Args:
        history: `test_set`, `epoch` and `numbers` of evaluations, the last one last.
        metric: As in `best_evaluation`.
        test_sets: As in `best_evaluation`.
        counts: Counts of the test sets, if they are known.
        source_end: The last epoch on the source alone, which has a row too; None: there is none.
    """
    chosen, last = best_evaluation(history, metric, test_sets), history[-1]["epoch"]
    best = chosen["epoch"] if chosen is not None else last
    rows = []
    for name in dict.fromkeys(entry["test_set"] for entry in history):
        for entry in history:
            epoch = entry["epoch"]
            if entry["test_set"] == name and epoch in (0, best, last, source_end):
                when = f"after epoch {epoch}" if epoch else "before training"
                mark = ", direct transfer" if epoch == source_end else ""
                mark += " (best)" if epoch == best != last else ""
                rows.append((name, when + mark, entry["numbers"]))
    return results_table(rows, counts)


def results_table(
    rows: Sequence[tuple[str, str, Mapping[str, float]]], counts: Mapping[str, Counts] = _NO_COUNTS
) -> str:
    """A table in percent of (test set, weights, numbers), and the counts behind the figures.

    If a test set has ignored queries, a column tells how many queries count. If it has ignored
    queries, junk or distractors, a line below the table counts them.

    Args:
        rows: The rows; different rows may have different numbers.
        counts: Counts of the test sets, if they are known.
    """
    columns = [*dict.fromkeys(name for _, _, numbers in rows for name in numbers)]
    differ = any(each.ignored for each in counts.values())
    body = []
    for name, weights, numbers in rows:
        row = [name, weights]
        row += [f"{100 * numbers[key]:.1f}" if key in numbers else "" for key in columns]
        if differ:
            known = counts.get(name)
            row.append(f"{known.with_match:,} of {known.queries:,}" if known else "")
        body.append(row)
    headers = ["test set", "weights", *columns, *(["queries that count"] if differ else [])]
    table = tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)
    lines = [
        f"{name}: {each.text()}"
        for name, each in counts.items()
        if each.ignored or each.junk or each.distractors
    ]
    return "\n".join((table, *lines))
