"""BUC: the published numbers, data on which the published code fails, a small run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.config import load_config
from reid.engine.hooks.checkpoints import checkpoint_paths, epoch_of
from reid.engine.optimization import Optimization
from reid.engine.trainer import Trainer
from reid.labelling import ClusteringError
from reid.modeling.losses import Criterion
from reid.modeling.weights import read_checkpoint
from reid.projects.buc import BottomUp, BUCLoss, EmbeddingHead
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings, FeatureSet, FeatureTokens, ImageRecord, PseudoLabels

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[1] / "configs"


def embeddings(e: Tensor) -> Embeddings:
    bank = e[:, None]
    return Embeddings(bank, bank, bank, e)


def read(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def features_of(feature: Tensor, present: Tensor | None = None) -> FeatureSet:
    features = FeatureSet.of(feature)
    if present is not None:
        object.__setattr__(features, "present", present)
    return features


def units(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def records(count: int) -> list[ImageRecord]:
    return [ImageRecord(f"{i}.jpg", -1, 0) for i in range(count)]


@pytest.mark.oracle
def test_loss_gradient_and_memory_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("buc_memory*.npz"))
    assert files
    for path in files:
        a = read(path)
        count, dim = a["memory"].shape
        loss = BUCLoss(dim, 1 / float(a["scale"]))
        for step in range(3):
            given = {k.split(".")[1]: v for k, v in a.items() if k.startswith(f"step{step}.")}
            label, e = given["label"].long(), given["feature"].float().requires_grad_()
            if not step:
                # one image for each cluster besides the batch's gives the memory its C rows
                loss.set_labels(PseudoLabels.from_clusters(torch.arange(count)), None)
                assert not loss.memory.rows.any()
            seen = (embeddings(e), Batch.of(torch.empty(len(e), 0), index=label))
            value = loss(*seen)["repelled"]
            value.backward()
            assert float(value.detach()) == pytest.approx(float(given["loss"]), rel=1e-5), path
            assert e.grad is not None
            scale = max(float(given["grad"].abs().max()), 1e-12)
            assert float((e.grad - given["grad"]).abs().max()) <= 1e-5 * scale, path
            loss.commit(*seen)
            torch.testing.assert_close(
                loss.memory.rows[0].double(), given["memory_after"].double(), atol=1e-6, rtol=0
            )


@pytest.mark.oracle
def test_merges_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("buc_merge_*.npz"))
    assert files
    for path in files:
        a = read(path)
        count, merges = len(a["label"]), int(a["num_to_merge"])
        labeller = BottomUp((merges + 0.5) / count, float(a["size_penalty"]))
        first = labeller(features_of(a["step0.feature"].float()), records(count))
        assert first.cluster.tolist() == a["label"].tolist()
        for step in range(5):
            found = labeller(features_of(a[f"step{step}.feature"].float()), records(count))
            assert found.cluster.tolist() == a[f"step{step}.label_after"].tolist(), (path, step)


def test_the_first_loss_is_log_c_without_gradient() -> None:
    loss = BUCLoss(8)
    loss.set_labels(PseudoLabels.from_clusters(torch.arange(6)), None)
    e = units(4).requires_grad_()
    value = loss(embeddings(e), Batch.of(torch.empty(4, 0), index=torch.arange(4)))["repelled"]
    value.backward()
    assert float(value.detach()) == pytest.approx(math.log(6))
    assert e.grad is not None
    assert not e.grad.any()


def test_an_unlabelled_image_and_one_cluster_give_no_loss() -> None:
    loss = BUCLoss(8)
    batch = Batch.of(torch.empty(2, 0), index=torch.tensor([0, 2]))
    for cluster in ([-1, 0, -1], [0, 0, 0]):
        loss.set_labels(PseudoLabels.from_clusters(torch.tensor(cluster)), None)
        seen = (embeddings(units(2)), batch)
        loss.commit(*seen)
        assert float(loss(*seen)["repelled"]) == 0


def test_fp16_that_took_no_step_moves_nothing() -> None:
    loss = BUCLoss(8)
    loss.set_labels(PseudoLabels.from_clusters(torch.arange(2)), None)
    seen = (embeddings(units(2)), Batch.of(torch.empty(2, 0), index=torch.arange(2)))
    loss.commit(*seen, taken=torch.tensor(False))
    assert not loss.memory.rows.any()
    with torch.autocast("cpu", torch.bfloat16):
        loss.commit(*seen)
        assert loss(*seen)["repelled"].dtype == torch.float32
    assert loss.memory.rows.dtype == torch.float32


def test_the_head_trains_the_embedding_and_tests_the_layer_below() -> None:
    backbone = nn.Module()
    backbone.embed_dim = 6  # type: ignore[assignment]
    torch.manual_seed(0)
    head = EmbeddingHead(backbone, dim=40)
    tokens = torch.randn(8, 1, 6)
    out = head.train()(FeatureTokens(tokens, (1, 1)), Batch.of(torch.empty(8, 0)))
    torch.testing.assert_close(out.test, F.normalize(tokens[:, 0], dim=1))
    e, unit = out.post[:, 0], out.unit[:, 0]
    kept = e != 0
    assert 0.3 < float(kept.float().mean()) < 0.7
    torch.testing.assert_close(e[kept], 2 * unit[kept])
    bn = F.batch_norm(head.embedding(tokens[:, 0]), None, None, training=True)
    torch.testing.assert_close(unit, F.normalize(bn, dim=1))
    assert head.neck.bias.requires_grad
    out = head.eval()(FeatureTokens(tokens, (1, 1)), Batch.of(torch.empty(8, 0)))
    torch.testing.assert_close(out.post, out.unit)
    one = head.train()(FeatureTokens(tokens[:1], (1, 1)), Batch.of(torch.empty(1, 0)))
    assert bool(torch.isfinite(one.post).all())
    for options in ({"dim": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="expected dim of 1 or more and dropout"):
            EmbeddingHead(backbone, **options)  # type: ignore[arg-type]


def test_too_few_images_or_clusters_are_told() -> None:
    with pytest.raises(ClusteringError, match=r"0\.05 of 19 images is less than one cluster"):
        BottomUp()(features_of(units(19)), records(19))
    labeller = BottomUp(0.4)
    for _ in range(3):
        labels = labeller(features_of(units(10)), records(10))
    assert labels.num_clusters == 2
    before = labeller.state_dict()["labels"].clone()
    with pytest.raises(ClusteringError, match="2 clusters are left, too few for 4 merges"):
        labeller(features_of(units(10)), records(10))
    assert torch.equal(labeller.state_dict()["labels"], before)
    with pytest.raises(ValueError, match="expected the 10 images of before, got 11"):
        labeller(features_of(units(11)), records(11))
    with pytest.raises(ValueError, match="needs the features"):
        labeller(None, records(10))
    for options in ((0.0, 0.1), (1.0, 0.1), (0.1, -1.0)):
        with pytest.raises(ValueError, match="expected merge_share above 0"):
            BottomUp(*options)


def test_unreadable_images_keep_their_cluster() -> None:
    feature = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 1]]), dim=1)
    labeller = BottomUp(0.2, 0.0)
    labeller(features_of(feature), records(5))
    assert labeller(features_of(feature), records(5)).cluster.tolist() == [0, 0, 1, 2, 3]
    present = torch.tensor([True, False, True, True, True])
    found = labeller(features_of(feature, present), records(5))
    assert found.cluster.tolist() == [0, -1, 1, 1, 2]
    assert labeller.state_dict()["labels"].tolist() == [0, 0, 1, 1, 2]


def test_labels_persist_in_the_state() -> None:
    one, other = BottomUp(0.2), BottomUp(0.2)
    one(features_of(units(10)), records(10))
    one(features_of(units(10)), records(10))
    other.load_state_dict(one.state_dict())
    after = [x(features_of(units(10, 1)), records(10)).cluster.tolist() for x in (one, other)]
    assert after[0] == after[1]
    fresh = BottomUp(0.2)
    fresh.load_state_dict({})
    assert fresh.state_dict() == {}
    for wrong in (torch.tensor([0.5]), torch.tensor([7]), [0], torch.tensor([[0]])):
        with pytest.raises(ValueError, match="labels: expected the cluster of each image"):
            fresh.load_state_dict({"labels": wrong})


@pytest.mark.parametrize("name", ["market", "duke", "msmt"])
def test_published_hyper_parameters(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.solver.max_epochs == 20 + 18 * 2
    first, merged = config.of_stage(0).solver, config.of_stage(1).solver
    assert (first.base_lr, first.max_epochs, first.milestones) == (0.1, 20, [16])
    assert (merged.base_lr, merged.max_epochs, merged.milestones) == (0.01, 2, [])
    assert (first.optimizer, first.momentum, first.nesterov) == ("SGD", 0.9, True)
    assert (first.weight_decay, first.lr_factors) == (5e-4, {"backbone": 0.1})
    assert [stage.labels for stage in config.stage_settings] == ["once", "once"]
    assert config.labeller == {"name": "BottomUp", "merge_share": 0.05, "size_penalty": 0.003}
    assert config.dataloader.sampler == {"name": "ImageSampler", "batch_size": 16}
    assert config.criterion == [{"name": "BUCLoss", "temperature": 0.1, "momentum": 0.5}]
    assert config.model.head == {"name": "EmbeddingHead", "dim": 2048, "dropout": 0.5}
    assert config.input.interpolation == config.input.test_interpolation == "bilinear"


class Embed(nn.Module):
    """A linear model without dropout, which would differ between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)

    def forward(self, batch: Batch) -> Embeddings:
        return embeddings(F.normalize(self.layer(batch.image.flatten(1)), dim=1))


class FixedBatches(list[Batch]):
    @property
    def batch_sampler(self) -> FixedBatches:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the batches are the same in every epoch."""


def three_steps(share: slice) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, loss = Embed(), BUCLoss(8)
    image, rows = torch.randn(16, 3, 2, 2), torch.randperm(16)[share]
    loss.set_labels(PseudoLabels.from_clusters(torch.arange(16) // 3), None)
    optimizer = build_optimizer(model.named_parameters(), "SGD", lr=0.1, nesterov=True)
    optimization = Optimization(optimizer, LearningRate(0.1, 1), CPU)
    loader: Any = FixedBatches([Batch.of(image[rows], index=rows)] * 3)
    Trainer(model, Criterion([loss]), optimization, loader, max_epochs=1, device=CPU).train()
    return {"weight": model.layer.weight.detach(), "rows": loss.memory.rows}


def process(rank: int, world_size: int) -> Any:
    return three_steps(slice(8 * rank, 8 * rank + 8))


def test_two_processes_train_like_one(in_two_processes: Callable[..., list[Any]]) -> None:
    alone = three_steps(slice(None))
    for found in in_two_processes(process):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_a_small_run_resumes_in_any_stage(train_tiny: Callable[..., Path]) -> None:
    pairs: Any = (
        "MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet}", "MODEL.HEAD.DIM", "16",
        "CLUSTERER", "null", "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "CHECKPOINT_KEEP", "0",
        "STAGES.0.EPOCHS", "2", "STAGES.0.SOLVER.MILESTONES", "[1]", "STAGES.1.REPEAT", "2",
        "SOLVER.MAX_EPOCHS", "6", "TEST.EVAL_PERIOD", "0",
    )  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    expected, _ = read_checkpoint(whole / "model_final.safetensors")
    for path in checkpoint_paths(whole):  # newest first
        if epoch_of(path) > 3:
            path.unlink()
    (whole / "model_final.safetensors").unlink()
    train_tiny(CONFIGS / "market.yaml", "whole", *pairs, resume=True)
    found, _ = read_checkpoint(whole / "model_final.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
