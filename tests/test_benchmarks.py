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
    assert (sent[0].result, sent[0].gpu_mb) == (7, 2)


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
