"""PCL-CLIP: the published numbers, data on which the published code fails, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reid.assembly.network import build_trained_model
from reid.config import load_config
from reid.engine.optimization import Optimization
from reid.labelling import ClusteringError
from reid.modeling import clip
from reid.modeling.backbones import TimmBackbone
from reid.modeling.clip import CLIPViT
from reid.modeling.formats import FORMATS, find_format, translate
from reid.modeling.losses import STUDENT, Criterion, CrossEntropy
from reid.modeling.model import ReIDModel
from reid.modeling.vit import ViT
from reid.modeling.weights import load_weights, read_checkpoint, save_weights
from reid.projects.clustercontrast import ClusterContrastLoss
from reid.projects.pclclip import TwoNeckHead
from reid.solver import LearningRate, build_optimizer, find_frozen
from reid.structures import Batch, FeatureSet, PseudoLabels
from reid.workflows.first_labels import first_labels

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = torch.device("cpu")
TINY = "{NAME: CLIPViT, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 2, PROJECTION: 16}"


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def ours(given: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors of the authors' names that start so, under our names."""
    (known,) = (each for each in FORMATS if each.name == "pcl-clip")
    cut = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
    found = translate(cut, known)
    assert not found.unmapped
    return found.state


def small_model(given: Mapping[str, Tensor], folder: Path) -> ReIDModel:
    """The network of an oracle file, with its weights, read as a file of the authors."""
    state = {k.removeprefix("state."): v for k, v in given.items() if k.startswith("state.")}
    known = find_format(state)
    assert known is not None
    assert known.name == "pcl-clip"
    save_weights(folder / "authors.safetensors", state, {})
    height, width = given["image"].shape[2:]
    backbone = CLIPViT((height, width), embed_dim=24, num_heads=2, projection=16)
    model = ReIDModel(backbone, TwoNeckHead(backbone))
    named, _ = read_checkpoint(folder / "authors.safetensors")
    report = load_weights(model, named)
    assert not report.missing
    assert not report.unexpected
    return model


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, float(error)


@pytest.mark.oracle
def test_features_gradients_and_statistics_of_the_authors(oracle_dir: Path, tmp_path: Path) -> None:
    files = sorted(oracle_dir.glob("clipvit_*.npz"))
    assert files
    for path in files:
        given = tensors(path)
        model = small_model(given, tmp_path).eval()
        batch = Batch.of(given["image"].float())
        with torch.no_grad():
            found = model(batch)
        close(found.post[:, 0], given["eval_neck"])
        close(found.unit[:, 0], given["eval_feature"])
        close(found.test, given["eval_feature"])
        model.train()
        feature = model(batch).unit[:, 0]
        close(feature.detach(), given["train_feature"])
        (feature * given["grad_out"]).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        expected = ours(given, "grad.")
        assert len(expected) == 9 + (len(expected) > 9)
        for name, gradient in expected.items():
            largest = gradient.abs().max()
            assert gradients[name] is not None, name
            assert (gradients[name] - gradient).abs().max() <= 1e-4 * largest, name
        close(model.head.neck.running_mean, given["running_mean_after"])
        close(model.head.projection_neck.running_mean, given["running_mean_proj_after"])


@pytest.mark.oracle
def test_four_steps_of_the_authors(oracle_dir: Path, tmp_path: Path) -> None:
    files = sorted(oracle_dir.glob("pclclip_*.npz"))
    assert files
    for path in files:
        given = tensors(path)
        mean, std = (given[key][:, None, None] for key in ("pixel_mean", "pixel_std"))
        image = (given["image"].float() / 255 - mean) / std
        model = small_model(given, tmp_path).eval()
        with torch.no_grad():
            feature = model(Batch.of(image)).test
        close(feature, given["feature"], 2e-5)
        update: Any = "hard" if given["use_hard"] else "sequential"
        contrast = ClusterContrastLoss(
            float(given["temperature"]), float(given["momentum"]), update
        )
        losses: list[Any] = [contrast]
        if given["id_weight"] > 0:
            losses.append(CrossEntropy(40, 6, float(given["smoothing"])))
            losses[1].classifier.weight.data.copy_(given["state.classifier.weight"])
        criterion = Criterion(losses, [1.0, float(given["id_weight"])][: len(losses)])
        criterion.set_labels(PseudoLabels.from_clusters(given["label"]), FeatureSet.of(feature))
        close(contrast.memory.rows[0], given["memory"], 2e-5)
        named = [*model.named_parameters(), *criterion.named_parameters()]
        rate = float(given["lr"])
        optimization = Optimization(
            build_optimizer(named, "SGD", lr=rate, momentum=float(given["sgd_momentum"]),
                            weight_decay=float(given["weight_decay"])),
            LearningRate(rate, 1, warmup_epochs=0),
            CPU,
            frozen=find_frozen(named, {"backbone.net.patch_embed": "always"}),
        )  # fmt: skip
        model.train()
        largest = float(given["losses"].max())
        for step, index in enumerate(given["batches"]):
            optimization.begin(model, 0, step)
            batch = Batch.of(image[index], index=index)
            embeddings = {STUDENT: model(batch)}
            values = [*criterion(embeddings, batch).values()]
            total = torch.stack(values).sum()
            found = torch.stack([total, *values, *[total * 0] * (2 - len(values))]).detach()
            assert (found - given["losses"][step]).abs().max() <= 2e-5 * largest, path
            optimization.backward(total)
            optimization.step()
            criterion.commit({STUDENT: embeddings[STUDENT].map(Tensor.detach)}, batch)
            close(contrast.memory.rows[0], given["memory_after"][step], 2e-5)
        state = model.state_dict()
        for name, tensor in ours(given, "final.").items():
            close(state[name], tensor, 2e-5)
        if "final.classifier.weight" in given:
            close(losses[1].classifier.weight.detach(), given["final.classifier.weight"], 2e-5)
        model.eval()
        with torch.no_grad():
            close(model(Batch.of(image)).test, given["final_feature"], 1e-4)


def test_the_head_needs_clip() -> None:
    with pytest.raises(ValueError, match="expected CLIPViT, got TimmBackbone"):
        TwoNeckHead(TimmBackbone("test_resnet", (32, 32)))
    with pytest.raises(ValueError, match="expected CLIPViT, got ViT"):
        TwoNeckHead(ViT((32, 32), embed_dim=24, depth=1, num_heads=2))
    with pytest.raises(ValueError, match="the head needs CLIP's projection"):
        TwoNeckHead(CLIPViT((32, 32), embed_dim=24, depth=1, num_heads=2, projection=0))


def test_a_batch_of_one_image_trains() -> None:
    backbone = CLIPViT((32, 32), embed_dim=24, depth=1, num_heads=2, projection=16)
    model = ReIDModel(backbone, TwoNeckHead(backbone)).train()
    found = model(Batch.of(torch.randn(1, 3, 32, 32)))
    assert found.unit.shape == (1, 1, 40)
    assert bool(torch.isfinite(found.unit).all())
    found.unit.sum().backward()


@pytest.mark.parametrize(
    ("name", "eps", "update"),
    [("market", 0.5, "sequential"), ("market_hard", 0.4, "hard"), ("msmt", 0.7, "sequential"),
     ("duke", 0.5, "sequential")],
)  # fmt: skip
def test_published_hyper_parameters(name: str, eps: float, update: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.dataloader.sampler == {
        "name": "CrossCameraSampler", "batch_size": 256, "images_per_identity": 16,
        "steps_per_epoch": 200,
    }  # fmt: skip
    assert config.clusterer is not None
    assert [config.clusterer[key] for key in ("k1", "k2", "eps", "min_samples")] == [30, 6, eps, 4]
    (loss,) = config.criterion
    assert (loss["temperature"], loss["momentum"], loss["update"]) == (0.05, 0.1, update)
    assert config.model.backbone == {"name": "CLIPViT", "pretrained": True}
    assert config.input.pixel_mean == (0.485, 0.456, 0.406)
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("SGD", 3.5e-4, 5e-4)
    assert solver.frozen == {"backbone.net.patch_embed": "always"}
    assert (solver.max_epochs, solver.amp, config.model.bn_samples_per_group) == (60, "fp16", 0)
    rate = LearningRate(
        solver.base_lr, 60, solver.schedule, tuple(solver.milestones), solver.gamma,
        warmup_epochs=solver.warmup_epochs, warmup_start=solver.warmup_factor,
    )  # fmt: skip
    published = {0: 3.5e-6, 1: 3.815e-5, 2: 7.28e-5, 9: 3.1535e-4, 10: 3.5e-4, 19: 3.5e-4,
                 20: 3.5e-5, 39: 3.5e-5, 40: 3.5e-6, 59: 3.5e-6}  # fmt: skip
    assert {epoch: rate(epoch) for epoch in published} == pytest.approx(published)


@pytest.mark.parametrize("name", ["supervised_market", "supervised_msmt"])
def test_published_hyper_parameters_with_labels(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.clusterer is None
    assert config.dataloader.sampler == {
        "name": "RandomIdentitySampler", "batch_size": 256, "images_per_identity": 8,
        "steps_per_epoch": 200,
    }  # fmt: skip
    contrast, identity = config.criterion
    assert (contrast["temperature"], contrast["momentum"], contrast["update"]) == (
        0.05,
        0.2,
        "hard",
    )
    assert (identity["weight"], identity["smoothing"], identity["init_std"]) == (0.25, 0.1, 0.001)
    assert (config.input.pixel_mean, config.input.pixel_std) == ((0.5,) * 3, (0.5,) * 3)
    solver = config.solver
    assert (solver.milestones, solver.warmup_factor, config.seed) == ([30, 50], 0.1, 1234)
    assert (solver.warmup_epochs, solver.max_epochs) == (10, 60)


@pytest.mark.parametrize("name", ["tmgf_market", "tmgf_msmt"])
def test_tmgfs_head_on_clip_differs_from_tmgf_in_the_trunk_alone(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    tmgf = load_config(CONFIGS.parents[1] / "TMGF" / "configs" / f"{name[5:]}.yaml")
    assert (config.model.head, config.criterion) == (tmgf.model.head, tmgf.criterion)
    assert config.dataloader == tmgf.dataloader
    assert config.model.backbone == {"name": "CLIPViT", "pretrained": True, "projection": 0}
    assert config.model.backbone_weights == ""


def test_whole_runs(train_tiny: Callable[..., Path]) -> None:
    """Without labels, with labels, and with TMGF's head."""
    few = ("DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "SOLVER.AMP", "off")
    identities = ("CLUSTERER", "null", "DATALOADER.SAMPLER.IMAGES_PER_IDENTITY", "4")
    runs: dict[str, tuple[str, ...]] = {
        "market": ("DATALOADER.SAMPLER.IMAGES_PER_IDENTITY", "4"),
        "supervised_market": identities,
        "tmgf_market": ("MODEL.HEAD.GRANULARITIES", "[1, 2]"),
    }
    for name, pairs in runs.items():
        folder = train_tiny(CONFIGS / f"{name}.yaml", name, "MODEL.BACKBONE", TINY, *few, *pairs)
        lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        assert losses
        assert min(losses) > 0
        first, _ = read_checkpoint(folder / "model_final.safetensors")
        assert first["backbone.net.patch_embed.proj.weight"].shape == (24, 3, 16, 16)


def test_a_resumed_run_is_the_uninterrupted_one(train_tiny: Callable[..., Path]) -> None:
    pairs = ("MODEL.BACKBONE", TINY, "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "SOLVER.AMP", "off",
             "DATALOADER.SAMPLER.IMAGES_PER_IDENTITY", "4", "TEST.EVAL_PERIOD", "0")  # fmt: skip
    whole = train_tiny(CONFIGS / "market.yaml", "whole", *pairs)
    stopped = train_tiny(CONFIGS / "market.yaml", "two", *pairs, "SOLVER.MAX_EPOCHS", "1")
    half, _ = read_checkpoint(stopped / "model_final.safetensors")
    train_tiny(CONFIGS / "market.yaml", "two", *pairs, resume=True, allow_config_change=True)
    one, _ = read_checkpoint(whole / "model_final.safetensors")
    other, _ = read_checkpoint(stopped / "model_final.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    frozen = "backbone.net.patch_embed.proj.weight"
    moved = [name for name in one if not torch.equal(one[name], half[name])]
    assert moved
    assert frozen not in moved


def test_a_trained_model_needs_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(clip.timm, "create_model", create)
    backbone = CLIPViT((32, 32), embed_dim=24, depth=2, num_heads=2, projection=16)
    model = ReIDModel(backbone, TwoNeckHead(backbone))
    save_weights(tmp_path / "model.safetensors", model.state_dict(), {})
    config = load_config(CONFIGS / "market.yaml", [
        "MODEL.BACKBONE", TINY.replace("}", ", PRETRAINED: true}"),
        "MODEL.WEIGHTS", str(tmp_path / "model.safetensors"),
    ])  # fmt: skip
    found = build_trained_model(config, (32, 32)).state_dict()
    assert all(found[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_first_labels_are_counted_without_training(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path_factory.getbasetemp() / "drawn_once"))
    persons = ("{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 4, NUM_CAMERAS: 3, HEIGHT: 48, "
               "WIDTH: 32}")  # fmt: skip
    pairs = ("DATASETS.TRAIN", persons, "INPUT.SIZE", "[48, 32]", "MODEL.BACKBONE", TINY, "DEVICE",
             "cpu", "DATALOADER.NUM_WORKERS", "0", "CLUSTERER.K1", "6", "CLUSTERER.K2", "2",
             "CLUSTERER.EPS", "0.8", "CLUSTERER.MIN_SAMPLES", "2", "OUTPUT_DIR",
             str(tmp_path))  # fmt: skip
    config = load_config(CONFIGS / "market.yaml", pairs)
    numbers = first_labels(config)
    count = round(numbers["clusters"])
    assert count >= 1
    assert json.loads((tmp_path / "first_labels.json").read_text())["clusters"] == count
    assert first_labels(config, count) == numbers
    with pytest.raises(
        ClusteringError, match=f"expected about {10 * count:,} clusters, got {count}"
    ):
        first_labels(config, 10 * count)
    assert not [*tmp_path.glob("*.safetensors"), *tmp_path.glob("checkpoint*")]
