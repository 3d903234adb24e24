from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from reid.registry import ConfigError
from reid.workflows.comparison import Paper, compare_results, load_paper, results_text

TABLES = """
paper: A paper
data_config: "{dataset}.yaml"
metrics: [mAP, Rank-1]
datasets: {small: {label: Small}, large: {label: Large, beside: small}}
methods:
  a: {label: A, configs: [a.yaml], published: {small: [10, 20]}}
  b: {label: B, configs: [b.yaml], published: {small: [30, null]}}
  c: {label: C, configs: [c.yaml], published: {small: [20, 40]}}
  d: {label: D, published: {small: [90, 95]}}
tables:
  2: {title: Two, datasets: [small], metrics: [mAP, Rank-1], rows: {a: First, b: "", c: "", d: ""}}
"""


def load(folder: Path, text: str = TABLES) -> Paper:
    (folder / "tables.yaml").write_text(text)
    return load_paper(folder / "tables.yaml")


def compare(paper: Paper, dataset: str, results: Any) -> dict[str, Any]:
    return compare_results(paper, 2, dataset, ["a", "b", "c", "d"], results, {"c": "seed 2 failed"})


RESULTS = {
    "a": {1: {"mAP": 0.1, "Rank-1": 0.2}, 2: {"mAP": 0.13, "Rank-1": 0.2}},
    "b": {1: {"mAP": 0.4, "Rank-1": 0.5}, 2: {"mAP": 0.4, "Rank-1": 0.5}},
    "c": {1: {"mAP": 0.5, "Rank-1": 0.1}, 2: None},
}


def test_mean_spread_and_difference(tmp_path: Path) -> None:
    found = compare(load(tmp_path), "small", RESULTS)
    first, second, third, fourth = found["rows"]
    assert (first["label"], second["label"]) == ("First", "B")
    cell = first["metrics"]["mAP"]
    assert cell["mean"] == pytest.approx(11.5)
    assert cell["std"] == pytest.approx(3 / 2**0.5)  # n - 1: [10, 13] is 1.5 from its mean twice
    assert (cell["paper"], cell["difference"]) == (10, pytest.approx(1.5))
    assert second["metrics"]["Rank-1"]["paper"] is second["metrics"]["Rank-1"]["difference"] is None
    assert (third["finished_seeds"], third["seeds"]) == ([1], [1, 2])
    assert third["metrics"]["mAP"]["std"] is None
    assert fourth["seeds"] == []
    assert fourth["metrics"]["mAP"]["mean"] is None
    assert json.loads(json.dumps(found)) == found


def test_order(tmp_path: Path) -> None:
    order = compare(load(tmp_path), "small", RESULTS)["order"]
    # paper: a < c < b, ours: a < b < c; the pair (b, c) is reversed
    found = {"rows": 3, "pairs": 3, "agree": 2}
    assert order["mAP"] == found | {
        "kendall_tau": pytest.approx(1 / 3),
        "spearman_rho": pytest.approx(0.5),  # 1 - 6 * (1 + 1 + 0) / (3 * 8)
    }
    found = {"rows": 2, "pairs": 1, "agree": 0}
    assert order["Rank-1"] == found | {"kendall_tau": -1, "spearman_rho": pytest.approx(-1)}
    one = compare(load(tmp_path), "small", {"a": RESULTS["a"]})["order"]
    assert one == {"mAP": None, "Rank-1": None}
    equal = {name: {1: {"mAP": 0.5, "Rank-1": 0.5}} for name in "abc"}
    assert compare(load(tmp_path), "small", equal)["order"]["mAP"]["kendall_tau"] is None


def test_text_and_markdown(tmp_path: Path) -> None:
    text = results_text(compare(load(tmp_path), "small", RESULTS))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "First 11.5 ± 2.1 10.0 +1.5 20.0 ± 0.0 20.0 +0.0 2/2" in rows
    assert "C 50.0 20.0 +30.0 10.0 40.0 -30.0 1/2 seed 2 failed" in rows
    assert "D - 90.0 - - 95.0 - -" in rows
    order = "mAP: 2 of 3 pairs of the 3 rows that have both numbers are in the paper's order"
    assert f"{order} (Kendall's tau-b 0.33, Spearman's rho 0.50; 1 = the same" in text
    assert "Mean ± sample standard deviation (n - 1)" in text
    assert "another data set" not in text
    markdown = results_text(compare(load(tmp_path), "small", RESULTS), "github")
    assert "| First " in markdown


def test_other_data_than_the_papers(tmp_path: Path) -> None:
    found = compare(load(tmp_path), "large", RESULTS)
    assert found["rows"][0]["metrics"]["mAP"]["paper"] == 10
    assert found["rows"][0]["metrics"]["mAP"]["difference"] is None
    assert found["order"]["mAP"]["pairs"] == 3
    text = results_text(found)
    assert "those on Small: another data set" in text
    assert "diff" not in text


def test_a_column_that_the_evaluator_does_not_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"table 2, a: expected Rank-1 among .*, got mAP"):
        compare(load(tmp_path), "small", {"a": {1: {"mAP": 0.1}}})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label: A,", "label: A, lable: B,", "lable"),
        ("small: [10, 20]", "small: [10]", r"methods\.a\.published\.small: expected 2 numbers"),
        ("small: [10, 20]", "smal: [10, 20]", r"methods\.a\.published: .*'smal'.*mean 'small'"),
        ("small: [10, 20]", "small: [10, x]", "'x'"),
        ("beside: small", "beside: none", r"datasets\.large\.beside: .*'none'"),
        ("rows: {a: First", "rows: {e: First", r"tables\.2\.rows: expected one of a, b, c, d"),
        ("metrics: [mAP, Rank-1], rows", "metrics: [AP], rows", r"tables\.2\.metrics: .*'AP'"),
        ("datasets: [small]", "datasets: [smal]", r"tables\.2\.datasets: .*'smal'"),
        ("paper: A paper", "paper: [", "cannot be read"),
        ("paper: A paper", "", "paper"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLES
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, TABLES.replace(old, new, 1))
    assert "tables.yaml" in str(caught.value)


def test_unknown_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="table: expected one of 2 of A paper, got 7"):
        load(tmp_path).table(7)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TABLES, "[a, b]", r"tables\.yaml: expected KEY: VALUE lines, got \['a', 'b'\]"),
        (TABLES, "", r"yaml: expected KEY: VALUE lines, got None"),
        ("{small: {label: Small}, large", "[small]\nx: {large", "x: unknown key; known: paper, "),
        ("{label: Small}", "[Small]", r"datasets\.small: expected KEY: VALUE lines, got \['Small'"),
        ("published: {small: [10, 20]}", "published: [10, 20]", r"a\.published: expected {str: "),
        ("[mAP, Rank-1]\n", "{mAP: 1}\n", r"metrics: expected \[str, \.\.\.\], got {'mAP': 1}"),
        ("[mAP, Rank-1]\n", "[[mAP]]\n", r"metrics\[0\]: expected str, got \['mAP'\]"),
        ("small: [10, 20]", "small: [10, .nan]", r"small\[1\]: expected a finite number"),
        ("  2: {", "  two: {", r"tables, key: expected int, got 'two'"),
        ("label: A, ", "", r"methods\.a\.label: is missing"),
    ],
)  # fmt: skip
def test_other_shapes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLES
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, TABLES.replace(old, new, 1))


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_only_regular_files_are_tables(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(2**33)
    for name, message in (
        ("pipe", "is a pipe, expected a regular file"),
        ("zero", "is a device, expected a regular file"),
        ("sparse", "8,589,934,592 bytes are too many for a text"),
        ("gone", "there is no such file"),
    ):
        with pytest.raises(
            ConfigError, match=rf"tables file '.*{name}\.yaml' cannot be .*{message}"
        ):
            load_paper(tmp_path / f"{name}.yaml")
