"""The measurements that the benchmarks report."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
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
    assert told["over_floor"] > 0


PERSONS = (
    "{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 5, NUM_CAMERAS: 3, NUM_DISTRACTORS: 4, "
    "HEIGHT: 32, WIDTH: 16}"
)
RUN = f"""
DATASETS: {{TRAIN: {PERSONS}}}
INPUT: {{SIZE: [32, 16], TRANSFORMS: [RandomFlip]}}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {{NAME: PKSampler, BATCH_SIZE: 16, STEPS_PER_EPOCH: 3}}
MODEL: {{BACKBONE: {{NAME: TimmBackbone, MODEL: test_resnet}}}}
CRITERION: [Triplet]
CLUSTERER: {{NAME: JaccardDBSCAN, K1: 6, K2: 2, EPS: 0.8, MIN_SAMPLES: 2}}
SOLVER: {{OPTIMIZER: Adam, MILESTONES: [9]}}
DEVICE: cpu
"""
ARGUMENTS = {
    "pseudo_labels": ["--images", "300", "--dim", "16"],
    "ranking": ["--dim", "16"],
    "reranking": ["--dim", "16"],
    "losses": ["--proxies", "64", "--banks", "2", "--dim", "16"],
    "loading": ["--images", "32", "--rounds", "1"],
    "epoch": ["--config-file", "run.yaml", "--epochs", "2"],
    "search": ["--images", "400", "--dim", "16", "--queries", "20", "--kinds", "exact"],
    "review": ["--images", "60", "--persons", "6", "--dim", "8", "--answers", "2"],
    "export": ["--batches", "2", "--rounds", "1"],
    "neighbors": ["--images", "400", "--dim", "16", "--kind", "isotropic"],
    "approximate": ["--images", "400", "--dim", "16", "--k1", "9"],
    "shards": ["--images", "400", "--dim", "16", "--block-rows", "90", "--compare"],
}
SLOW = {"review", "export", "pseudo_labels", "reranking"}


@pytest.fixture
def floors(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("floors")
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 0.0)
    return module


@pytest.fixture
def run_here(
    measure: Any, floors: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], None]:
    """Runs a benchmark on a small input, in this process."""

    def measure_here(
        work: Any, inputs: Any, *args: Any, warm_up: Any = None, device: str = "cpu",
        floor: Any = None,
    ) -> Any:  # fmt: skip
        sent: list[Any] = []
        pipe = SimpleNamespace(send=sent.append)
        measure._child(pipe, work, inputs, args, warm_up, device, floor)
        return sent[-1]

    def run(name: str) -> None:
        benchmark = importlib.import_module(name)
        if hasattr(benchmark, "measure"):
            monkeypatch.setattr(benchmark, "measure", measure_here)
        if name in ("ranking", "reranking"):
            monkeypatch.setitem(benchmark.SIZES, "market1501", (60, 200, 10, 4))
        if name == "loading":
            monkeypatch.setattr(benchmark, "ProcessPoolExecutor", ThreadPoolExecutor)
        if name == "export":
            options = {"name": "IBNViT", "embed_dim": 24, "depth": 2, "num_heads": 3}
            tiny = ((32, 16), options, "BNNeckHead")
            monkeypatch.setattr(benchmark, "MODELS", {"tiny": tiny})
            monkeypatch.setattr(benchmark, "PRODUCT", 64)
        (tmp_path / "run.yaml").write_text(RUN)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("REID_DATASETS", str(tmp_path))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *ARGUMENTS[name]])
        benchmark.main()

    return run


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ARGUMENTS],
)
def test_each_benchmark_tells_its_floor(
    run_here: Callable[[str], None], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "export":
        pytest.importorskip("onnxruntime")
    threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        run_here(name)
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    told = json.loads(lines[-1])
    over = told["networks"][0]["over_floor"] if name == "export" else told["over_floor"]
    values = [*over.values()] if isinstance(over, dict) else [over]
    assert values
    assert all(value > 0 for value in values)
    if "floor_parts" in told:
        assert sum(told["floor_parts"].values()) == pytest.approx(told["floor_seconds"], rel=0.01)
        assert told["over_floor"] == pytest.approx(
            told["floor_taken_seconds"] / told["floor_seconds"], rel=0.01
        )
    assert told.get("agrees") in (None, True)


def test_every_benchmark_is_run_above() -> None:
    tools = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert tools - {"backbone", "label_stages"} <= ARGUMENTS.keys()


def test_products_are_recorded_with_their_shapes_and_counts(floors: Any) -> None:
    calls: list[tuple[int, ...]] = []
    weight = torch.randn(3, 5, requires_grad=True)
    products = floors.Products()
    with products:
        for _ in range(4):
            (torch.ones(2, 3) @ weight).sum().backward()
        torch.ones(7, 2).exp()
    counts = sorted(count for _, count in products._calls.values())
    assert counts == [4, 4]  # forward, and the gradient of the weight
    for call, _ in products._calls.values():
        calls.append(tuple(call().shape))
    assert sorted(calls) == [(2, 5), (3, 5)]
    assert products.seconds() > 0


def test_a_floor_is_the_sum_of_its_parts(floors: Any) -> None:
    floor = floors.Floor({"products": 1.5, "reading": 0.5}, 3.0)
    assert floor.over == 1.5
    assert floor.facts() == {
        "over_floor": 1.5,
        "floor_seconds": 2.0,
        "floor_taken_seconds": 3.0,
        "floor_parts": {"products": 1.5, "reading": 0.5},
    }


def test_the_floor_of_a_side_is_measured_before_and_after(measure: Any, floors: Any) -> None:
    sent: list[Any] = []
    times = iter([1.0, 3.0])
    measure._child(
        SimpleNamespace(send=sent.append), len, range, (7,), None, "cpu",
        lambda count: {"products": count * next(times)},
    )  # fmt: skip
    assert sent[-1].floor.parts == {"products": 14.0}


METHODS = (
    "ClusterContrast", "CAP", "O2CAP", "TMGF", "SpCL", "PPLR", "ICE", "RLCC", "BUC", "HCT",
    "IICS stage 1", "IICS stage 2", "MGH", "MultiCentroid", "ClusterEnsemble", "SSG", "MMT",
    "SpCL with a source",
)  # fmt: skip

QUICK_METHODS = {"ClusterContrast", "SpCL", "BUC", "IICS stage 1", "MMT"}


@pytest.fixture
def label_stages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("label_stages")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[pytest.mark.slow] * (method not in QUICK_METHODS))
        for method in METHODS
    ],
)
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
