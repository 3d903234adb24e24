"""The measurements that the benchmarks report."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "tools" / "benchmarks"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("measure")


def test_a_side_is_measured_in_a_new_process(measure: Any) -> None:
    measured = measure.measure(len, range, 10)
    assert measured.result == 10
    assert measured.seconds >= 0
    assert measured.cpu_seconds >= 0
    assert measured.gpu_mb is None


def test_a_side_on_a_gpu(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-ins for a GPU; the clock must be read after the GPU has finished.
    calls: list[str] = []
    monkeypatch.setattr(measure, "_put", lambda data, device: calls.append(device) or data)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    sent: list[Any] = []

    class Pipe:
        send = sent.append

    def work(data: range) -> int:
        calls.append("work")
        return len(data)

    measure._child(Pipe, work, range, (7,), None, "cuda")
    assert calls == ["cuda", "synchronize", "reset", "work", "synchronize"]
    assert (sent[-1].result, sent[-1].gpu_mb) == (7, 2)


@pytest.mark.parametrize("stage", ["extraction", "training"])
def test_the_networks_equations_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    backbone = importlib.import_module("backbone")
    tiny = {"image_size": (32, 16), "embed_dim": 24, "depth": 2, "num_heads": 3}
    monkeypatch.setitem(backbone.MODELS, "vit_small", tiny)
    monkeypatch.setattr(
        sys, "argv", ["backbone.py", "--stage", stage, "--batch", "2", "--rounds", "1"]
    )
    backbone.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["stage"] == f"backbone {stage}"
    assert told["agrees"]


METHODS = (
    "ClusterContrast", "CAP", "O2CAP", "TMGF", "SpCL", "PPLR", "ICE", "RLCC", "BUC", "HCT",
    "IICS stage 1", "IICS stage 2", "MGH", "MultiCentroid", "ClusterEnsemble", "SSG", "MMT",
    "SpCL with a source",
)  # fmt: skip


@pytest.fixture
def label_stages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("label_stages")


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_label_stage_runs(label_stages: Any, method: str) -> None:
    case = label_stages.CASES[method]
    stage = label_stages.make_stage(method, 600, label_stages.find_shapes(case))
    numbers = label_stages.run_stage(stage)
    assert numbers["clusters"] >= 1
    assert numbers["clusters"] + numbers["outliers"] <= 600
    if not case.source:  # SSG's eps of a share of all pairs leaves few images of 600
        assert numbers["outliers"] < 60


def test_label_stages_of_all_methods_are_measured(
    label_stages: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(METHODS) == set(label_stages.CASES)

    def measure(work: Any, inputs: Any, *args: Any, warm_up: Any) -> Any:
        result = {"clusters": 5.0, "outliers": 2.0}
        return sys.modules["measure"].Measured(3.21, 4.4, None, result, 2.16, 1.0)

    monkeypatch.setattr(label_stages, "measure", measure)
    argv = ["label_stages.py", "--methods", "CAP", "BUC", "--images", "32621"]
    monkeypatch.setattr(sys, "argv", argv)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    label_stages.main()
    lines = capsys.readouterr().out.splitlines()
    cap, buc = (json.loads(line) for line in lines[:2])
    assert (cap["CPU s"], cap["MB"], cap["clusters"], cap["outliers"]) == (2.2, 4, 5, 2)
    assert cap["published"] == "V and Jaccard 8.5 GB"
    assert buc["published"] == "distances 4.3 GB; their order, int64 25.5 GB"
    assert lines[-1].startswith("| BUC ")
