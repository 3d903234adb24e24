"""TMGF in training: the authors' eight steps, several processes, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.config import load_config
from reid.engine.optimization import Optimization
from reid.engine.trainer import Trainer
from reid.evaluation.extract import extract_features
from reid.modeling.formats import use_our_names
from reid.modeling.losses import Criterion
from reid.modeling.model import ReIDModel
from reid.modeling.weights import load_weights, read_checkpoint
from reid.projects.o2cap import O2CAPLoss
from reid.projects.tmgf import IBNViT, TMGFHead
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings, FeatureSet, ImageRecord, PseudoLabels
from reid.workflows.train import train

MEAN = torch.tensor([0.3525, 0.3106, 0.3140])[:, None, None]
STD = torch.tensor([0.2660, 0.2522, 0.2505])[:, None, None]
CPU = torch.device("cpu")


class Batches(list[Batch]):
    """A loader of given batches."""

    @property
    def batch_sampler(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the batches are the same in every epoch."""


@pytest.mark.oracle
def test_eight_steps_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("training_run*.npz"))
    assert files
    for path in files:
        a = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
        state = {n.removeprefix("state."): v for n, v in a.items() if n.startswith("state.")}
        image = (a["image"].float() / 255 - MEAN) / STD
        camid = a["camid"].long()
        count, size = len(image), (image.shape[2], image.shape[3])
        backbone = IBNViT(
            size, num_cameras=len(state["base.sie_embed"]), num_heads=3, drop_path=0.0,
            embed_dim=state["base.cls_token"].shape[2],
            depth=len({name.split(".")[2] for name in state if name.startswith("base.blocks.")}),
        )  # fmt: skip
        model = ReIDModel(backbone, TMGFHead(backbone))
        load_weights(model, use_our_names(state))
        records = [ImageRecord(f"{i}.jpg", -1, int(c)) for i, c in enumerate(camid)]

        def batch(rows: Tensor, image: Tensor = image, camid: Tensor = camid) -> Batch:
            return Batch.of(image[rows], camid[rows], rows)

        features = extract_features(model, [batch(torch.arange(count))], records, CPU)
        labels = PseudoLabels.from_clusters(a["cluster_label"].long(), camid)
        assert torch.equal(labels.proxy, a["proxy_label"].long())
        loss = O2CAPLoss(num_positives=int(a["pos_k"]), num_negatives=int(a["neg_k"]))
        loss.set_labels(labels, features)
        torch.testing.assert_close(loss.memory.rows, a["initial_bank"], atol=1e-5, rtol=0)

        lr = float(a["lr"])
        optimizer = build_optimizer(
            model.parameters(), "SGD", lr=lr, momentum=float(a["momentum"]),
            weight_decay=float(a["weight_decay"]),
        )  # fmt: skip
        optimization = Optimization(optimizer, LearningRate(lr, 1), CPU)
        loader: Any = Batches(batch(rows.long()) for rows in a["batches"])
        trainer = Trainer(model, Criterion([loss]), optimization, loader, max_epochs=1, device=CPU)
        found = []
        trainer.model.train()
        for rows in loader:
            trainer.run_step(rows)
            found.append([value.item() for value in trainer.losses.values()])
        np.testing.assert_allclose(found, a["losses"], rtol=1e-4, err_msg=str(path))
        final = extract_features(model, [batch(torch.arange(count))], records, CPU)
        close = {"atol": 1e-3, "rtol": 0}
        torch.testing.assert_close(final.test, a["final_global"], **close)
        torch.testing.assert_close(loss.memory.rows, a["final_bank"], **close)


def small_problem() -> tuple[nn.Module, Criterion, Batch]:
    """A linear model with a part, so that a sample's losses do not depend on its batch."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 16)

        def forward(self, batch: Batch) -> Embeddings:
            raw = self.layer(batch.image.flatten(1)).view(-1, 2, 8)
            unit = F.normalize(raw, dim=2)
            return Embeddings(raw, raw, unit, unit[:, 0])

    torch.manual_seed(0)
    model = Linear()
    image = torch.randn(48, 3, 2, 2)
    camids = torch.arange(48) % 3
    labels = PseudoLabels.from_clusters(torch.arange(48) // 3 % 4, camids)
    with torch.no_grad():
        out = model(Batch.of(image, camids))
    features = FeatureSet.of(out.test, camids=camids, unit=out.unit)
    criterion = Criterion([O2CAPLoss()])
    criterion.set_labels(labels, features)
    rows = torch.randperm(48)[:16]
    return model, criterion, Batch.of(image[rows], camids[rows], rows)


def one_step(batch: Batch, model: nn.Module, criterion: Criterion) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimization = Optimization(optimizer, LearningRate(0.1, 1), CPU)
    loader: Any = Batches([batch])
    trainer = Trainer(model, criterion, optimization, loader, max_epochs=1, device=CPU)
    for _ in range(2):
        trainer.run_step(batch)
    loss = criterion.losses[0]
    assert isinstance(loss, O2CAPLoss)
    return {"weight": model.layer.weight.detach(), "bank": loss.memory.rows, **trainer.losses}


def process(rank: int, world_size: int) -> Any:
    model, criterion, batch = small_problem()
    share = len(batch.index) // world_size
    part = batch.map(lambda column: column[rank * share : (rank + 1) * share])
    return one_step(part, model, criterion)


def test_two_processes_train_like_one(in_two_processes: Callable[..., list[Any]]) -> None:
    shares = in_two_processes(process)
    model, criterion, batch = small_problem()
    whole = one_step(batch, model, criterion)
    assert torch.equal(shares[0]["bank"], shares[1]["bank"])
    assert torch.equal(shares[0]["weight"], shares[1]["weight"])
    for name, expected in whole.items():
        found = (shares[0][name] + shares[1][name]) / 2
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, msg=name)


CONFIG = """
PLUGINS: [tmgf]
DATASETS:
  TRAIN: {NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2,
          HEIGHT: 48, WIDTH: 32}
INPUT: {SIZE: [48, 32], TRANSFORMS: [RandomFlip, {NAME: PadCrop, PAD: 2}, RandomErasing]}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {NAME: ProxyBalancedSampler, BATCH_SIZE: 16, STEPS_PER_EPOCH: 3}
MODEL:
  BACKBONE: {NAME: IBNViT, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 2, STEM_CHANNELS: 8, DROP_PATH: 0.3}
  HEAD: {NAME: TMGFHead, GRANULARITIES: [2, 3]}
CLUSTERER: {NAME: CameraProxyClusterer, K1: 6, K2: 2, EPS: 0.8, MIN_SAMPLES: 2}
CRITERION: [O2CAPLoss]
SOLVER: {BASE_LR: 1.0e-2, MAX_EPOCHS: 2, WARMUP_EPOCHS: 1, MILESTONES: []}
DEVICE: cpu
"""


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path / "datasets"))
    (tmp_path / "tmgf.yaml").write_text(CONFIG)
    return tmp_path / "tmgf.yaml"


def run(file: Path, output: str, *pairs: str) -> Path:
    folder = file.parent / output
    train(load_config(file, ["OUTPUT_DIR", str(folder), *pairs]))
    return folder


def test_whole_run_repeats_bit_for_bit_with_any_number_of_workers(config_file: Path) -> None:
    first = run(config_file, "first")
    second = run(config_file, "second", "DATALOADER.NUM_WORKERS", "1")
    one, _ = read_checkpoint(first / "model_final.safetensors")
    other, _ = read_checkpoint(second / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [json.loads(line) for line in (first / "metrics.json").read_text().splitlines()]
    labels = [line for line in lines if line["kind"] == "labels"]
    assert [line["epoch"] for line in labels] == [0, 1]
    assert {"clusters", "proxies", "outliers", "images/cluster", "purity", "ARI"} <= labels[
        0
    ].keys()
    losses = next(line for line in lines if line["kind"] == "train")
    assert {
        "loss",
        "global_offline",
        "global_online",
        "part_offline",
        "part_online",
    } <= losses.keys()


def test_identities_for_clusters(config_file: Path) -> None:
    folder = run(config_file, "gt", "CLUSTERER", "null", "SOLVER.MAX_EPOCHS", "1")
    first = json.loads((folder / "metrics.json").read_text().splitlines()[0])
    assert (first["clusters"], first["outliers"], first["purity"]) == (10, 0, 1)


def test_one_image_in_a_batch(config_file: Path) -> None:
    sampler = "{NAME: ProxyBalancedSampler, BATCH_SIZE: 1, IMAGES_PER_PROXY: 1, STEPS_PER_EPOCH: 2}"
    folder = run(config_file, "one", "DATALOADER.SAMPLER", sampler, "SOLVER.MAX_EPOCHS", "1")
    state, _ = read_checkpoint(folder / "model_final.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_data_without_cameras_and_identities(config_file: Path) -> None:
    persons = next((config_file.parent / "datasets").glob("*"), None)
    if persons is None:
        run(config_file, "drawn", "SOLVER.MAX_EPOCHS", "1")
    drawn = sorted((config_file.parent / "datasets").glob("*/*/bounding_box_train/*.jpg"))
    paths = "".join(f"{path.relative_to(drawn[0].parent)}\n" for path in drawn)
    (drawn[0].parent / "list.csv").write_text(f"path\n{paths}")
    relative = (drawn[0].parent / "list.csv").relative_to(config_file.parent / "datasets")
    folder = run(
        config_file, "unknown", "DATASETS.TRAIN", f"{{NAME: CSV, PATH: {relative}}}",
        "SOLVER.MAX_EPOCHS", "1",
    )  # fmt: skip
    state, metadata = read_checkpoint(folder / "model_final.safetensors")
    assert "backbone.camera_embed" not in state
    assert metadata["num_cameras"] == "0"
    first = json.loads((folder / "metrics.json").read_text().splitlines()[0])
    assert first["clusters"] == first["proxies"]
    assert "purity" not in first
    assert "nothing will be evaluated" in (folder / "log.txt").read_text()
