from __future__ import annotations

from typing import Any

from reid.evaluation.relevance import Counts
from reid.evaluation.tables import best_evaluation, results_table, summary_table


def entry(name: str, epoch: int, value: float, metric: str = "mAP") -> dict[str, Any]:
    return {"test_set": name, "epoch": epoch, "numbers": {metric: value}}


HISTORY = [
    entry("a", 0, 0.9), entry("b", 0, 0.1),
    entry("a", 1, 0.5), entry("b", 1, 0.3),
    entry("a", 2, 0.7), entry("b", 2, 0.2),
    entry("a", 3, 0.7), entry("b", 3, 0.4),
]  # fmt: skip


def test_the_first_test_set_chooses_among_trained_weights() -> None:
    assert best_evaluation(HISTORY, "mAP", ["a", "b"]) == entry("a", 2, 0.7)
    assert best_evaluation(HISTORY, "mAP", ["b", "a"]) == entry("b", 3, 0.4)
    assert best_evaluation(HISTORY[:2], "mAP", ["a", "b"]) == entry("a", 0, 0.9)


def test_the_next_test_set_chooses_where_the_first_has_no_figures() -> None:
    alone = [each for each in HISTORY if each["test_set"] == "b"]
    assert best_evaluation(alone, "mAP", ["a", "b"]) == entry("b", 3, 0.4)
    assert best_evaluation([entry("a", 1, 0.5, "F1"), *alone], "mAP", ["a", "b"]) == alone[-1]
    assert best_evaluation([], "mAP", ["a"]) is None
    assert best_evaluation([entry("a", 1, 0.5, "F1")], "mAP", ["a"]) is None


def test_a_run_in_a_table() -> None:
    lines = summary_table(HISTORY, "mAP", ["a", "b"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["test set", "weights", "mAP"]
    assert cells[2:] == [
        ["a", "before training", "90.0"],
        ["a", "after epoch 2 (best)", "70.0"],
        ["a", "after epoch 3", "70.0"],
        ["b", "before training", "10.0"],
        ["b", "after epoch 2 (best)", "20.0"],
        ["b", "after epoch 3", "40.0"],
    ]


def test_direct_transfer_has_a_row() -> None:
    table = summary_table(HISTORY, "mAP", ["b", "a"], source_end=2)
    assert "after epoch 2, direct transfer" in table
    assert "after epoch 3" in table


def test_counts_are_shown_if_queries_are_ignored() -> None:
    whole = Counts(queries=20, with_match=20, gallery=97, junk=0, distractors=0)
    few = Counts(queries=10, with_match=1, gallery=1097, junk=3, distractors=20)
    rows = [("a", "w", {"mAP": 0.5}), ("b", "w", {"F1": 0.25})]
    assert results_table(rows, {"a": whole}) == results_table(rows)
    lines = results_table(rows, {"a": whole, "b": few}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0] == ["test set", "weights", "mAP", "F1", "queries that count"]
    assert cells[2:] == [["a", "w", "50.0", "", "20 of 20"], ["b", "w", "", "25.0", "1 of 10"]]
    assert lines[4:] == [
        "b: 10 queries: 1 with a match, 9 ignored; 1,097 gallery images: 3 junk, 20 distractors"
    ]
