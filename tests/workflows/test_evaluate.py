"""Evaluations in runs and with `--eval-only`: computed once, and an error never ends a training."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reid.config import Config, load_config
from reid.engine.testing import EvaluationError
from reid.evaluation import extract, ranking
from reid.evaluation.evaluation import Evaluation
from reid.evaluation.evaluators import Evaluator
from reid.evaluation.ranking_kernels import Distances
from reid.evaluation.report import evaluate_file, report_text
from reid.registry import EVALUATOR
from reid.structures import DataError, FeatureSet, ImageRecord, ProgressBar
from reid.workflows.evaluate import evaluate
from reid.workflows.train import train

PERSONS = (
    "{NAME: SyntheticPersons, NUM_TRAIN: 6, NUM_TEST: 5, NUM_CAMERAS: 3, NUM_DISTRACTORS: 4, "
    "HEIGHT: 32, WIDTH: 16}"
)
SETTINGS = f"""
DATASETS: {{TRAIN: {PERSONS}}}
INPUT: {{SIZE: [32, 16]}}
DATALOADER: {{NUM_WORKERS: 0, SAMPLER: {{NAME: PKSampler, BATCH_SIZE: 8, STEPS_PER_EPOCH: 1}}}}
MODEL: {{BACKBONE: {{NAME: TimmBackbone, MODEL: test_resnet}}}}
CRITERION: [Triplet]
SOLVER: {{OPTIMIZER: Adam, MAX_EPOCHS: 1, WARMUP_EPOCHS: 0, MILESTONES: []}}
TEST: {{RANKED_LISTS: 3}}
DEVICE: cpu
"""


@EVALUATOR.register()
class RaisesFor(Evaluator):
    """Market-1501's mAP, but an error for test sets with at least the given number of queries."""

    def __init__(self, queries: int) -> None:
        self._queries = queries

    def __call__(
        self, evaluation: Evaluation, progress: ProgressBar | None = None
    ) -> dict[str, float]:
        if len(evaluation.query) >= self._queries:
            raise LookupError("no frames")
        return {"mAP": evaluation.ranking.mAP}


@EVALUATOR.register()
class SameCameraToo(Evaluator):
    """Share of queries whose nearest gallery image is of their identity, whatever the camera."""

    metrics = ("nearest",)
    needs_match = False

    def __call__(
        self, evaluation: Evaluation, progress: ProgressBar | None = None
    ) -> dict[str, float]:
        assert np.isnan(evaluation.ranking.mAP)
        assert np.isnan(evaluation.ranking.rank(1))
        query, gallery = evaluation.query, evaluation.gallery
        nearest = (query.test @ gallery.test.T).argmax(1)
        return {"nearest": float((gallery.pids[nearest] == query.pids).float().mean())}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("evaluations")
    (folder / "run.yaml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATASETS", str(folder / "datasets"))
        yield folder


def config(root: Path, output: str, *pairs: Any) -> Config:
    return load_config(root / "run.yaml", ["OUTPUT_DIR", str(root / output), *map(str, pairs)])


def write_list(root: Path, name: str, rows: Sequence[tuple[int, str, str]]) -> str:
    """Writes a CSV dataset of (pid, camid, split); returns its spec."""
    folder = root / "datasets" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "list.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "pid", "camid", "split"))
        for number, (pid, camid, split) in enumerate(rows):
            pixels = np.random.default_rng(number).integers(0, 255, (32, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            writer.writerow((f"{number}.png", pid, camid, split))
    return f"{{NAME: CSV, PATH: {name}/list.csv}}"


def one_camera(root: Path) -> str:
    """Case 01: all images come from one camera."""
    rows = [(i % 4, "0", split) for split in ("query", "gallery") for i in range(6)]
    return write_list(root, "one_camera", rows)


def few_matches(root: Path) -> str:
    """Case 02: only one of ten queries has a match in another camera."""
    rows = [(i, "0", "query") for i in range(10)]
    rows += [(i, "1" if i == 3 else "0", "gallery") for i in range(10)]
    return write_list(root, "few_matches", rows)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts how often query and gallery features are extracted, and distances computed."""
    counts = {"extractions": 0, "passes": 0}
    extract_features, distance_blocks = extract.extract_features, ranking.distance_blocks

    def extracting(
        model: Any, loader: Any, records: Sequence[ImageRecord], *args: Any, **options: Any
    ) -> FeatureSet:
        counts["extractions"] += 1
        return extract_features(model, loader, records, *args, **options)

    def computing(*features: Tensor) -> Iterator[tuple[int, Distances]]:
        counts["passes"] += 1
        return distance_blocks(*features)

    monkeypatch.setattr(extract, "extract_features", extracting)
    monkeypatch.setattr(ranking, "distance_blocks", computing)
    return counts


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    train(config(root, "finished"))
    return root / "finished"


def test_a_runs_end_extracts_and_ranks_once(root: Path, counted: dict[str, int]) -> None:
    train(config(root, "counted"))
    assert counted == {"extractions": 1, "passes": 1}
    names = {entry.name for entry in (root / "counted").iterdir()}
    assert {"ranked_lists.png", "similarities.png", "results.json"} <= names
    (final,) = json.loads((root / "counted" / "results.json").read_text())["final"]
    assert {"counts", "ap", "ranked_by", "camera_pairs", "per_query_AP"} <= final.keys()


def test_eval_only_with_pictures_extracts_and_ranks_once(
    root: Path, finished: Path, counted: dict[str, int]
) -> None:
    weights = ("MODEL.WEIGHTS", finished / "model_final.safetensors")
    found = evaluate(config(root, "eval", *weights))
    assert counted == {"extractions": 1, "passes": 1}
    assert (root / "eval" / "ranked_lists_eval_only.png").is_file()
    assert (root / "eval" / "similarities_eval_only.png").is_file()
    written = json.loads((root / "eval" / "results_eval_only.json").read_text())
    assert written["SyntheticPersons"]["numbers"] == found["SyntheticPersons"]
    assert "failed" not in written
    # Another average precision needs no second pass either; only other distances do.
    evaluate(config(root, "eval2", *weights, "TEST.EVALUATOR.AP", "trapezoid"))
    assert counted == {"extractions": 2, "passes": 2}
    written = json.loads((root / "eval2" / "results_eval_only.json").read_text())
    details = written["SyntheticPersons"]
    assert details["ap"] == "trapezoid"
    known = [value for value in details["per_query_AP"] if value is not None]
    assert details["numbers"]["mAP"] == pytest.approx(np.mean(known))
    assert details["numbers"]["mAP"] < found["SyntheticPersons"]["mAP"]


def test_a_set_without_a_match_is_named_before_the_first_epoch(root: Path) -> None:
    spec = one_camera(root)
    with pytest.raises(DataError, match=r"one_camera: no query has a match: all images are of cam"):
        train(config(root, "alone", "DATASETS.TEST", f"[{spec}]"))
    assert not (root / "alone" / "config.yaml").exists()  # the run has not started
    train(config(root, "beside", "DATASETS.TEST", f"[{spec}, {PERSONS}]"))
    log = (root / "beside" / "log.txt").read_text()
    message = "one_camera: no query has a match: all images are of camera 0"
    assert 0 < log.index(message) < log.index("epoch 1/1")
    assert "leave camid empty if cameras do not matter. This test set is left out" in log
    final = json.loads((root / "beside" / "results.json").read_text())["final"]
    assert [entry["test_set"] for entry in final] == ["SyntheticPersons"]


def test_eval_only_of_a_set_without_a_match(root: Path, finished: Path) -> None:
    weights = ("MODEL.WEIGHTS", finished / "model_final.safetensors")
    with pytest.raises(DataError, match="leave camid empty if cameras do not matter"):
        evaluate(config(root, "eval3", *weights, "DATASETS.TEST", f"[{one_camera(root)}]"))
    # The message names the remedy, and it works.
    rows = [(i % 4, "", split) for split in ("query", "gallery") for i in range(6)]
    found = evaluate(
        config(root, "eval3", *weights, "DATASETS.TEST", f"[{write_list(root, 'none', rows)}]")
    )
    assert 0 < found["none"]["mAP"] <= 1


def test_queries_that_count_nowhere_are_counted(root: Path, finished: Path) -> None:
    weights = ("MODEL.WEIGHTS", finished / "model_final.safetensors")
    evaluate(config(root, "eval4", *weights, "DATASETS.TEST", f"[{few_matches(root)}]"))
    log = (root / "eval4" / "log_eval_only.txt").read_text()
    assert "few_matches: 9 of 10 queries have no match in another camera and count nowhere" in log
    assert "| queries that count" in log
    assert "| 1 of 10" in log
    written = json.loads((root / "eval4" / "results_eval_only.json").read_text())
    assert written["few_matches"]["counts"]["queries"] == {"all": 10, "with_match": 1, "ignored": 9}


def test_an_evaluators_error_does_not_end_training(root: Path) -> None:
    raises = ("TEST.EVALUATOR", "{NAME: RaisesFor, QUERIES: 9}", "SOLVER.MAX_EPOCHS", 2)
    sets = ("DATASETS.TEST", f"[{PERSONS}, {few_matches(root).replace('few_matches', 'small')}]")
    rows = [
        (i, camid, split) for i in range(4) for camid, split in (("0", "query"), ("1", "gallery"))
    ]
    write_list(root, "small", rows)
    folder = root / "raises"
    train(config(root, "raises", *sets, *raises, "TEST.EVAL_PERIOD", 1))
    results = json.loads((folder / "results.json").read_text())
    assert [entry["test_set"] for entry in results["final"]] == ["small"]
    assert [(entry["test_set"], entry["epoch"]) for entry in results["failed"]] == [
        ("SyntheticPersons", 1), ("SyntheticPersons", 2)]  # fmt: skip
    assert (folder / "model_final.safetensors").is_file()
    assert (folder / "model_best.safetensors").is_file()
    # A kill after the last epoch loses no notes about failures.
    for name in ("results.json", "model_final.safetensors"):
        (folder / name).unlink()
    train(config(root, "raises", *sets, *raises, "TEST.EVAL_PERIOD", 1), resume=True)
    again = json.loads((folder / "results.json").read_text())
    assert again["failed"] == results["failed"]
    assert again["final"] == results["final"]


def test_weights_are_written_before_the_last_evaluation(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reid.engine.hooks.evaluate.evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(root, "killed"))
    assert (root / "killed" / "model_final.safetensors").is_file()


def test_eval_only_reports_a_failure_after_the_other_figures(root: Path, finished: Path) -> None:
    rows = [
        (i, camid, split) for i in range(4) for camid, split in (("0", "query"), ("1", "gallery"))
    ]
    sets = f"[{PERSONS}, {write_list(root, 'small', rows)}]"
    pairs = ("MODEL.WEIGHTS", finished / "model_final.safetensors", "DATASETS.TEST", sets,
             "TEST.EVALUATOR", "{NAME: RaisesFor, QUERIES: 9}", "TEST.RANKED_LISTS", 2)  # fmt: skip
    with pytest.raises(EvaluationError, match="SyntheticPersons: LookupError: no frames"):
        evaluate(config(root, "eval5", *pairs))
    written = json.loads((root / "eval5" / "results_eval_only.json").read_text())
    assert written["small"]["numbers"]["mAP"] > 0
    assert written["failed"].keys() == {"SyntheticPersons"}
    assert torch.isfinite(torch.tensor(written["small"]["per_query_AP"])).all()


def test_an_evaluator_of_its_own_protocol_scores_a_set_without_a_match(
    root: Path, finished: Path, tmp_path: Path
) -> None:
    spec = one_camera(root)
    own = ("TEST.EVALUATOR", "SameCameraToo", "TEST.BEST_METRIC", "nearest")
    train(config(root, "own", "DATASETS.TEST", f"[{spec}]", *own))
    log = (root / "own" / "log.txt").read_text()
    assert "no match" not in log
    assert "queries that count" not in log
    (final,) = json.loads((root / "own" / "results.json").read_text())["final"]
    assert 0 <= final["numbers"]["nearest"] <= 1
    assert final["counts"]["queries"]["with_match"] == 0
    assert set(final["per_query_AP"]) == {None}
    assert (root / "own" / "model_best.safetensors").is_file()
    assert (root / "own" / "ranked_lists.png").is_file()
    weights = ("MODEL.WEIGHTS", root / "own" / "model_final.safetensors")
    found = evaluate(config(root, "eval_own", "DATASETS.TEST", f"[{spec}]", *own, *weights))
    assert found["one_camera"] == pytest.approx(final["numbers"])
    # features of other code
    ids = {"query_pids": [1, 2], "query_camids": [0, 0], "gallery_pids": [1, 2]}
    arrays = {name: np.array(value) for name, value in (ids | {"gallery_camids": [0, 0]}).items()}
    features = {"query_feat": np.eye(2), "gallery_feat": np.eye(2)}
    np.savez(tmp_path / "f.npz", **arrays, **features)
    report = evaluate_file(tmp_path / "f.npz", evaluator="SameCameraToo")
    assert report["numbers"] == {"nearest": 1}
    assert report["TPR@FPR"] == {}
    assert "nearest" in report_text(report)
    with pytest.raises(ValueError, match="no query has a match: all images are of camera 0"):
        evaluate_file(tmp_path / "f.npz")
