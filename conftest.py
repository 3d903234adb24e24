"""Shared fixtures."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import train_as_rank, work_as_rank
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from reid.config import load_config
from reid.modeling.memory_losses import MemoryLoss
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels
from reid.workflows.train import train

# Tests with several processes fork from one that has imported torch and this project once.
multiprocessing.set_forkserver_preload(["reid.workflows.train"])


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Folder with the numbers computed with the authors' code."""
    default = Path(__file__).parents[1] / "shared" / "oracles"
    folder = Path(os.environ.get("REID_ORACLES", default))
    if not folder.is_dir():
        pytest.skip(f"no oracle files: {folder} does not exist (set REID_ORACLES)")
    return folder


@pytest.fixture
def check_memory_loss(oracle_dir: Path) -> Callable[..., None]:
    """Three chained steps of published losses: values, gradients and the memory."""

    def check(
        pattern: str,
        make_loss: Callable[[Mapping[str, float]], MemoryLoss],
        names: Mapping[str, str],
    ) -> None:
        files = sorted(oracle_dir.glob(pattern))
        assert files
        for path in files:
            a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
            cluster = a["cluster_label"].long()
            camid = a.get("camid", torch.zeros_like(cluster)).long()
            labels = PseudoLabels.from_clusters(cluster, camid)
            if "proxy_label" in a:
                assert torch.equal(labels.proxy, a["proxy_label"].long())
            feature = a["feature"].double()
            loss = make_loss({name: value.item() for name, value in a.items() if not value.ndim})
            loss.set_labels(labels, FeatureSet.of(feature, camids=camid))
            agree(loss.memory.rows[0], a["memory"], f"{path} memory")
            for step in range(3):
                given = {k.split(".")[1]: v for k, v in a.items() if k.startswith(f"step{step}.")}
                index, f = given["index"].long(), given["feature"].double().requires_grad_()
                seen = (
                    Embeddings(f[:, None], f[:, None], f[:, None], f),
                    Batch.of(torch.empty(len(f), 0), camid[index], index),
                )
                losses = loss(*seen)
                total = torch.stack([*losses.values()]).sum()
                total.backward()
                for name, value in (*losses.items(), ("loss", total)):
                    agree(value.detach(), given[names.get(name, "loss")], f"{path} {step} {name}")
                assert f.grad is not None
                agree(f.grad, given["grad"], f"{path} {step} gradient")
                loss.commit(*seen)
                agree(loss.memory.rows[0], given["memory_after"], f"{path} {step} memory")

    def agree(found: Tensor, expected: Tensor, what: str) -> None:
        error = (found - expected).abs().max() / max(1.0, float(expected.abs().max()))
        assert error <= 1e-6, f"{what}: {float(error)}"

    return check


@pytest.fixture(autouse=True)
def no_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the test write no report.html, unless it has the mark `page`; it would take long."""
    if request.node.get_closest_marker("page") is None:
        monkeypatch.setattr("reid.workflows.train.report_at_end", lambda run: None)


@pytest.fixture
def train_tiny(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Trains a config with a tiny network on tiny drawn persons, all else as the config says."""
    monkeypatch.setenv("REID_DATASETS", str(tmp_path_factory.getbasetemp() / "drawn_once"))
    persons = (
        "{NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
        "HEIGHT: 48, WIDTH: 32}"
    )
    tiny: dict[str, Any] = {
        "DATASETS.TRAIN": persons, "INPUT.SIZE": "[48, 32]",
        "DATALOADER.NUM_WORKERS": 0, "DATALOADER.SAMPLER.BATCH_SIZE": 16,
        "MODEL.BACKBONE_WEIGHTS": "''", "CLUSTERER.K1": 6, "CLUSTERER.K2": 2, "CLUSTERER.EPS": 0.8,
        "CLUSTERER.MIN_SAMPLES": 2, "SOLVER.MAX_EPOCHS": 2, "DEVICE": "cpu",
    }  # fmt: skip

    def run(file: Path, output: str, *pairs: str, **options: bool) -> Path:
        folder = tmp_path / output
        small = [str(item) for pair in tiny.items() for item in pair]
        train(load_config(file, ["OUTPUT_DIR", str(folder), *small, *pairs]), **options)
        return folder

    return run


@pytest.fixture
def in_two_processes(tmp_path: Path) -> Callable[[Callable[[int, int], Any]], list[Any]]:
    """Calls a function of a test file with (rank, 2) in each of two processes of a group.

    Gives what both returned: tensors, or lists and dicts of them.
    """

    def run(work: Callable[[int, int], Any]) -> list[Any]:
        start_processes(work_as_rank, (str(tmp_path), work), nprocs=2, start_method="forkserver")
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return run


@pytest.fixture
def train_in_processes(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Trains a config by the command's code, with one process and with two; gives both folders."""

    def run(file: Path, *pairs: str) -> tuple[Path, Path]:
        for processes in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            world = {
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "REID_DATASETS": str(tmp_path / "data"),
            }  # fmt: skip
            folder, log = tmp_path / str(processes), f"{tmp_path}/{processes}"
            arguments = ["--config-file", str(file), *pairs, "OUTPUT_DIR", str(folder)]
            start_processes(
                train_as_rank, (world, arguments, log), nprocs=processes, start_method="forkserver"
            )
            said = "".join(path.read_text() for path in sorted(tmp_path.glob(f"{processes}.*.txt")))
            assert (folder / "model_final.safetensors").is_file(), said
        return tmp_path / "1", tmp_path / "2"

    return run


@pytest.fixture
def steps_in_processes(
    train_in_processes: Callable[..., tuple[Path, Path]],
) -> Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Trains as `train_in_processes`; gives what metrics.json says of each step of both runs."""

    def run(file: Path, *pairs: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        one, two = (
            [
                line
                for line in map(json.loads, (folder / "metrics.json").read_text().splitlines())
                if line["kind"] == "train"
            ]
            for folder in train_in_processes(file, *pairs)
        )
        assert len(one) == len(two) > 0
        return one, two

    return run
