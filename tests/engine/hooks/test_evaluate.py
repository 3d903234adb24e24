"""Evaluation during training: its cost, its files, and that its errors do not end training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from reid.engine.hooks import evaluate as hooks
from reid.engine.hooks.evaluate import Evaluate
from reid.evaluation import ranking
from reid.evaluation.evaluation import Evaluation
from reid.evaluation.evaluators import Evaluator, Market1501Evaluator
from reid.evaluation.extract import ImageSet
from reid.evaluation.query_gallery import QueryGallery
from reid.evaluation.ranking_kernels import Distances
from reid.registry import ConfigError
from reid.structures import Batch, DataError, Embeddings, ImageRecord, ProgressBar

BATCHES = 3


class Model(nn.Module):
    """Gives features by the image's index; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
        table = F.normalize(table + 2 * torch.eye(8)[torch.arange(24) % 6], dim=1)
        self.register_buffer("table", table)
        self.calls = 0

    def forward(self, batch: Batch) -> Embeddings:
        self.calls += 1
        assert isinstance(self.table, Tensor)
        feature = self.table[batch.index]
        return Embeddings(feature[:, None], feature[:, None], feature[:, None], feature)


class Writer:
    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.pictures: list[str] = []

    def write(self, kind: str, step: int, epoch: int, numbers: dict[str, float]) -> None:
        self.lines += [(name, epoch) for name in numbers]

    def write_image(self, name: str, path: Path, step: int) -> None:
        assert path.is_file()
        self.pictures.append(name)


class FailsFor(Evaluator):
    """Raises an error for test sets with the given number of queries."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(
        self, evaluation: Evaluation, progress: ProgressBar | None = None
    ) -> dict[str, float]:
        if len(evaluation.query) == self.count:
            raise ZeroDivisionError("no frames")
        return {"mAP": evaluation.ranking.mAP}


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    for i in range(24):
        Image.new("RGB", (8, 16), (10 * i, 0, 90)).save(tmp_path / f"{i}.png")
    return [ImageRecord(str(tmp_path / f"{i}.png"), i % 6, i // 6) for i in range(24)]


def make_set(name: str, records: list[ImageRecord], queries: int = 6) -> QueryGallery:
    rows = torch.arange(24)
    loader = [Batch.of(torch.zeros(8, 3, 2, 2), index=part) for part in rows.split(24 // BATCHES)]
    return QueryGallery(name, records[:queries], records[queries:], ImageSet(name, records, loader))


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Epochs whose weights were saved as the best."""
    epochs: list[int] = []
    monkeypatch.setattr(hooks, "save_model", lambda trainer, path: epochs.append(trainer.epoch))
    return epochs


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry each time distances are computed."""
    found: list[int] = []
    compute = ranking.distance_blocks

    def counted(*features: Tensor) -> Iterator[tuple[int, Distances]]:
        found.append(1)
        return compute(*features)

    monkeypatch.setattr(ranking, "distance_blocks", counted)
    return found


def make_hook(
    sets: list[QueryGallery], output: Path, evaluator: Evaluator | None = None, **options: Any
) -> tuple[Evaluate, Writer]:
    writer = Writer()
    given: Any = writer
    evaluator = evaluator or Market1501Evaluator()
    return Evaluate(sets, evaluator, given, output, {"seed": 1}, **options), writer


def run(hook: Evaluate, model: nn.Module, epochs: int) -> None:
    """Calls the hook as a training run would."""
    trainer: Any = SimpleNamespace(
        inference_model=model,
        also_tested={},
        device=torch.device("cpu"),
        epoch=0,
        max_epochs=epochs,
        step=0,
    )
    hook.before_train(trainer)
    for _ in range(epochs):
        trainer.epoch += 1
        trainer.step += 10
        hook.after_epoch(trainer)
    hook.after_train(trainer)


def read(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_features_and_distances_are_computed_once_at_a_runs_end(
    records: list[ImageRecord], tmp_path: Path, saved: list[int], passes: list[int]
) -> None:
    model = Model()
    sets = [make_set("a", records), make_set("b", records, queries=9)]
    hook, writer = make_hook(sets, tmp_path, ranked_lists=3)
    run(hook, model, 5)
    assert model.calls == 2 * BATCHES  # nothing was evaluated before the last epoch
    assert len(passes) == 2
    assert writer.pictures == ["pictures/ranked_lists", "pictures/similarities"]
    assert saved == [5]
    final = read(tmp_path)["final"]
    assert [entry["test_set"] for entry in final] == ["a", "b"]
    for entry in final:
        known = [value for value in entry["per_query_AP"] if value is not None]
        assert entry["numbers"]["mAP"] == pytest.approx(np.mean(known))
        assert entry["counts"]["queries"]["all"] == len(entry["per_query_AP"])
    assert final[0]["counts"] == {
        "queries": {"all": 6, "with_match": 6, "ignored": 0},
        "gallery": {"all": 18, "junk": 0, "distractors": 0},
    }
    assert final[0]["hardest_query_paths"][0] in [record.path for record in records[:6]]


def test_only_the_last_evaluation_collects_details(
    records: list[ImageRecord], tmp_path: Path, saved: list[int], passes: list[int]
) -> None:
    hook, writer = make_hook([make_set("a", records)], tmp_path, period=2, at_start=True)
    run(hook, Model(), 5)
    assert len(passes) == 4
    assert writer.pictures == []
    results = read(tmp_path)
    assert [entry["epoch"] for entry in results["history"]] == [0, 2, 4, 5]
    assert [*results["history"][0]] == ["test_set", "epoch", "numbers"]
    assert results["best"][0]["epoch"] == 2  # the earliest of equally good epochs
    assert saved == [2]
    assert results["failed"] == []


def test_an_evaluators_error_costs_only_the_figures_of_its_test_set(
    records: list[ImageRecord], tmp_path: Path, saved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    sets = [make_set("a", records), make_set("b", records, queries=9)]
    hook, writer = make_hook(sets, tmp_path, FailsFor(6), period=1, ranked_lists=3)
    with caplog.at_level(logging.ERROR):
        run(hook, Model(), 2)
    assert caplog.messages == [
        f"No figures after {epoch} epochs: a: ZeroDivisionError: no frames. Training goes on"
        for epoch in (1, 2)
    ]
    assert caplog.records[0].exc_info  # the author of a plug-in needs the traceback
    results = read(tmp_path)
    assert [entry["test_set"] for entry in results["final"]] == ["b"]
    assert results["failed"] == [
        {"test_set": "a", "epoch": epoch, "error": "a: ZeroDivisionError: no frames"}
        for epoch in (1, 2)
    ]
    assert results["best_chosen_by"] == "mAP on the test set b"
    assert saved == [1]
    assert writer.pictures == []

    again, _ = make_hook(sets, tmp_path, FailsFor(6))
    again.load_state_dict(hook.state_dict())
    assert again.state_dict() == hook.state_dict()


def test_no_set_with_figures(records: list[ImageRecord], tmp_path: Path, saved: list[int]) -> None:
    hook, _ = make_hook([make_set("a", records)], tmp_path, FailsFor(6), at_start=True)
    run(hook, Model(), 1)
    results = read(tmp_path)
    assert (results["final"], results["best"], saved) == ([], [], [])
    assert [entry["epoch"] for entry in results["failed"]] == [0, 1]


def test_an_image_that_cannot_be_read(
    records: list[ImageRecord], tmp_path: Path, saved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            raise DataError("7.png: is cut off")

    broken = QueryGallery("b", records[:6], records[6:], ImageSet("b", records, Broken()))
    hook, _ = make_hook([broken, make_set("a", records)], tmp_path)
    with caplog.at_level(logging.ERROR):
        run(hook, Model(), 1)
    (record,) = caplog.records
    assert "b: DataError: 7.png: is cut off" in record.getMessage()
    assert not record.exc_info
    assert [entry["test_set"] for entry in read(tmp_path)["final"]] == ["a"]


def test_an_error_while_drawing_costs_only_the_pictures(
    records: list[ImageRecord], tmp_path: Path, saved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    hook, writer = make_hook([make_set("a", records)], tmp_path, ranked_lists=3)
    Path(records[0].path).unlink()
    with caplog.at_level(logging.ERROR):
        run(hook, Model(), 1)
    assert "a: no pictures (" in caplog.text
    assert "0.png" in caplog.text
    assert writer.pictures == []
    assert read(tmp_path)["final"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite(
    records: list[ImageRecord], tmp_path: Path, saved: list[int], value: float
) -> None:
    class Undefined(Evaluator):
        def __call__(
            self, evaluation: Evaluation, progress: ProgressBar | None = None
        ) -> dict[str, float]:
            return {"mAP": 0.5, "AUC": value}

    hook, _ = make_hook([make_set("a", records)], tmp_path, Undefined())
    run(hook, Model(), 1)
    assert read(tmp_path)["failed"][0]["error"] == "a: ValueError: Undefined gave no finite AUC"


def test_the_best_metric_is_checked_before_training(
    records: list[ImageRecord], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"test\.best_metric: 'Rank-2' is not .* \(did you mean"):
        make_hook([make_set("a", records)], tmp_path, best_metric="Rank-2")


def test_the_best_metric_of_an_evaluator_without_a_list_of_metrics(
    records: list[ImageRecord], tmp_path: Path, saved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    hook, _ = make_hook([make_set("a", records)], tmp_path, FailsFor(0), best_metric="F1")
    with caplog.at_level(logging.ERROR):
        run(hook, Model(), 1)
    assert "test.best_metric: 'F1' is not among the evaluator's numbers: mAP" in caplog.text
    results = read(tmp_path)
    assert results["final"][0]["numbers"]["mAP"] > 0
    assert (results["best"], results["best_chosen_by"], saved) == ([], "", [])


ENTRY = {"test_set": "a", "epoch": 1, "numbers": {"mAP": 0.5}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"history": "a"}, "history: expected a list"),
        ({"history": [ENTRY, 3]}, r"history\[1\]: expected test_set, epoch, numbers, got 3"),
        ({"history": [{"test_set": "a"}]}, r"history\[0\]: expected test_set, epoch"),
        ({"history": [ENTRY | {"epoch": -1}]}, r"history\[0\]\.epoch: got -1"),
        ({"history": [ENTRY | {"epoch": True}]}, r"history\[0\]\.epoch: got True"),
        ({"history": [ENTRY | {"numbers": {"mAP": "x"}}]}, r"history\[0\]\.numbers"),
        ({"history": [ENTRY | {"numbers": {"mAP": float("nan")}}]}, r"history\[0\]\.numbers"),
        ({"history": [], "failed": [ENTRY]}, r"failed\[0\]: expected test_set, epoch, error"),
    ],
)
def test_a_broken_state_is_refused(
    records: list[ImageRecord], tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    hook, _ = make_hook([make_set("a", records)], tmp_path)
    with pytest.raises(ValueError, match=message):
        hook.check_state(state, Mock(), 99)
    hook.check_state({"history": [ENTRY]}, Mock(), 99)  # of an older version
    hook.load_state_dict({"history": [ENTRY]})
    assert hook.state_dict() == {"history": [ENTRY], "failed": []}
