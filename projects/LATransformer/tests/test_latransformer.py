"""LA-Transformer: network, losses and both protocols against the authors' numbers; a small run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.assembly.optimization import build_learning_rate, build_optimization
from reid.config import load_config
from reid.evaluation.ranking import rank
from reid.modeling.bottleneck_classifiers import BottleneckCrossEntropy
from reid.modeling.formats import use_our_names
from reid.modeling.losses import Criterion
from reid.modeling.model import ReIDModel
from reid.modeling.vit import ViT
from reid.modeling.weights import load_weights, read_checkpoint
from reid.projects.latransformer import LAHead, LATransformerEvaluator
from reid.projects.latransformer.evaluator import average_precision_of_best
from reid.projects.latransformer.head import average_windows
from reid.registry import ConfigError
from reid.structures import Batch, Embeddings, FeatureSet, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3,
                         "drop_path": 0.0}  # fmt: skip


def read(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape, what
    error = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, f"{what}: {error}"


def authors_model(a: Mapping[str, Tensor]) -> tuple[ReIDModel, BottleneckCrossEntropy]:
    """Our network and classifiers with the authors' weights; no dropout."""
    state = {name.removeprefix("state."): v for name, v in a.items() if name.startswith("state.")}
    image = a["image"]
    backbone = ViT(
        (image.shape[2], image.shape[3]), patch_size=int(a["patch"]), depth=int(a["depth"]),
        embed_dim=state["model.cls_token"].shape[2], num_heads=int(a["heads"]), drop_path=0.0,
    )  # fmt: skip
    model = ReIDModel(backbone, LAHead(backbone, int(a["parts"]), float(a["lambda_"])))
    report = load_weights(model, use_our_names(state))
    assert not (report.missing or report.unexpected)  # noqa: PT018
    width, classes = (state["classifier0.classifier.0.weight"].shape[i] for i in (1, 0))
    loss = BottleneckCrossEntropy(
        model.embed_dim, classes, width, dropout=0.0, num_parts=model.num_parts
    )
    for number, classifier in enumerate(loss.classifiers):
        names = {f"classifier{number}.add_block.": "", f"classifier{number}.classifier.0.": "3."}
        own = {
            ours + name.removeprefix(theirs): value
            for name, value in state.items()
            for theirs, ours in names.items()
            if name.startswith(theirs)
        }
        missing = classifier.load_state_dict(own, strict=False)
        assert set(missing.missing_keys) <= {"1.num_batches_tracked"}
        assert not missing.unexpected_keys
    loss.cluster = a["label"].long()
    return model, loss


def network_files(oracle_dir: Path) -> list[Path]:
    files = sorted(p for p in oracle_dir.glob("latransformer_*.npz") if "evaluation" not in p.stem)
    assert files
    return files


@pytest.mark.oracle
def test_outputs_loss_and_gradients_of_the_authors(oracle_dir: Path) -> None:
    for path in network_files(oracle_dir):
        a = read(path)
        model, loss = authors_model(a)
        batch = Batch.of(a["image"].float())
        with torch.no_grad():
            found = model.eval()(batch)
            close(loss.eval().logits(found), a["eval_logits"], f"{path} scores")
            tokens = model.backbone(batch).tokens
        parts = average_windows(tokens[:, 1:], model.num_parts)
        close(parts, a["test_parts"], f"{path} parts")
        close(found.test, a["test_feature"], f"{path} test feature")
        torch.testing.assert_close(found.test.norm(dim=1), torch.ones(len(parts)))
        model.train()
        found = model(batch)
        with torch.no_grad():
            close(loss.train().logits(found), a["train_logits"], f"{path} training scores")
        total = loss(found, batch)["cross_entropy"]
        close(total.detach(), a["loss"], f"{path} loss")
        total.backward()
        for name, expected in a.items():
            if name.startswith("grad."):
                gradient = our_parameter(model, loss, name.removeprefix("grad.")).grad
                assert gradient is not None, name
                error = (gradient - expected).abs().max() / expected.abs().max()
                assert error <= 1e-4, f"{path} {name}: {float(error)}"


def our_parameter(model: ReIDModel, loss: BottleneckCrossEntropy, name: str) -> Tensor:
    start, _, rest = name.partition(".")
    if start == "model":
        return model.backbone.net.get_parameter(rest)
    inner = rest.replace("add_block.", "").replace("classifier.0.", "3.")
    number = int(start.removeprefix("classifier"))
    return loss.classifiers[number].get_parameter(inner)


@pytest.mark.oracle
def test_both_protocols_of_the_authors(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("latransformer_evaluation*.npz"))
    assert files
    for path in files:
        a = read(path)
        sets = []
        for name in ("query", "gallery"):
            parts = F.normalize(a[f"{name}_parts"].double(), dim=2) / math.sqrt(14)
            sets.append(FeatureSet.of(parts.flatten(1).float(), a[f"{name}_pid"].long(),
                                      a[f"{name}_camid"].long()))  # fmt: skip
        query, gallery = sets
        close(query.test @ gallery.test.T, a["similarity"], f"{path} similarity", 1e-6)
        evaluator = LATransformerEvaluator()
        evaluation = rank(query, gallery)
        numbers = evaluator(evaluation)
        assert numbers.keys() == {*evaluator.metrics}
        expected = {"LA mAP@10": "map_top10", "LA Rank-1": "rank1", "LA Rank-5": "rank5",
                    "LA Rank-10": "rank10", "mAP": "market_mAP"}  # fmt: skip
        for ours, theirs in expected.items():
            assert numbers[ours] == pytest.approx(float(a[theirs]), abs=1e-6), f"{path} {ours}"
        for k in (1, 5, 10, 20):
            theirs = float(a["market_cmc"][k - 1])
            assert numbers[f"Rank-{k}"] == pytest.approx(theirs, abs=1e-6), f"{path} Rank-{k}"


def test_average_precision_of_the_best_by_hand() -> None:
    hits = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=bool)
    expected = [(1 + 2 / 3) / 2, 0, 1 / 2]
    assert average_precision_of_best(hits) == pytest.approx(expected)


def test_a_gallery_smaller_than_ten_images() -> None:
    query = FeatureSet.of(torch.eye(2), torch.tensor([4, 5]), torch.tensor([0, 0]))
    gallery = FeatureSet.of(torch.eye(2), torch.tensor([4, 5]), torch.tensor([1, 1]))
    numbers = LATransformerEvaluator(ranks=(1,))(rank(query, gallery))
    assert (numbers["LA mAP@10"], numbers["LA Rank-10"], numbers["Rank-1"]) == (1, 1, 1)


def test_windows() -> None:
    patches = torch.arange(5.0)[None, :, None]
    found = average_windows(patches, 2)
    assert found.flatten().tolist() == [1, 3]  # patches 0 to 2 and 2 to 4
    torch.manual_seed(0)
    patches = torch.randn(2, 35, 3)
    expected = F.adaptive_avg_pool1d(patches.transpose(1, 2), 14).transpose(1, 2)
    torch.testing.assert_close(average_windows(patches, 14), expected)
    with pytest.raises(
        ConfigError, match=r"model\.head\.num_parts: expected at most 35, .* got 36"
    ):
        average_windows(patches, 36)


def test_options_out_of_range() -> None:
    backbone = ViT((16, 16), **SMALL)
    with pytest.raises(ValueError, match=r"num_parts of 1 or more .* got 0, 8\.0"):
        LAHead(backbone, 0)
    with pytest.raises(ValueError, match="needs two identities or more, got 1"):
        BottleneckCrossEntropy(8, 1, num_parts=2)
    with pytest.raises(ValueError, match="parts needs a head with parts"):
        BottleneckCrossEntropy(8, 3)
    with pytest.raises(ValueError, match=r"0 <= dropout < 1, got 256, 1\.0"):
        BottleneckCrossEntropy(8, 3, dropout=1.0, num_parts=2)
    loss = BottleneckCrossEntropy(8, 3, num_parts=2)
    with pytest.raises(ValueError, match="expected 3 classes, got 2"):
        loss.set_labels(PseudoLabels.from_clusters(torch.tensor([0, 1])), None)


def test_the_starting_weights_and_a_batch_of_one_image() -> None:
    torch.manual_seed(0)
    loss = BottleneckCrossEntropy(64, 50, width=32, banks="all", num_parts=3, average=True)
    assert len(loss.classifiers) == 4
    reduce, norm, dropout, classify = loss.classifiers[0]
    for layer, std in ((reduce, math.sqrt(2 / 32)), (norm, 0.02), (classify, 0.001)):
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.5)
    assert dropout.p == 0.5
    assert norm.bias.requires_grad
    assert not any(bool(layer.bias.any()) for layer in (reduce, norm, classify))
    loss.set_labels(PseudoLabels.from_clusters(torch.arange(50)), None)
    bank = torch.randn(1, 4, 64)
    value = loss(Embeddings(bank, bank, bank, bank[:, 0]), Batch.of(torch.zeros(1, 0)))
    assert float(value["cross_entropy"].detach()) == pytest.approx(math.log(50), rel=0.01)


def test_rates_and_thawing_blocks_as_published() -> None:
    config = load_config(CONFIGS / "market.yaml")
    rate = build_learning_rate(config.solver)
    expected = [3e-4 * 0.8 ** (epoch // 2 + 1) for epoch in range(30)]
    assert [rate(epoch) for epoch in range(30)] == pytest.approx(expected)
    until = {int(name.rpartition(".")[2]): epoch for name, epoch in config.solver.frozen.items()}
    for epoch in range(30):
        frozen = {block for block, first in until.items() if epoch < first}
        trained = 12 if epoch >= 20 else 2 + epoch // 2
        assert frozen == set(range(12 - trained))
    solver = config.solver
    assert (solver.optimizer, solver.weight_decay, solver.max_epochs) == ("Adam", 5e-4, 30)
    assert config.input.size == (224, 224)
    assert config.input.transforms == [{"name": "RandomFlip", "prob": 0.5}]
    assert config.dataloader.sampler == {"name": "ImageSampler", "batch_size": 32}


def test_frozen_names_are_those_of_the_network() -> None:
    config = load_config(CONFIGS / "market.yaml")
    backbone = ViT((32, 32), **SMALL | {"depth": 12})
    model = ReIDModel(backbone, LAHead(backbone))
    loss = BottleneckCrossEntropy(24, 3, 8, num_parts=14)
    build_optimization(config, model, Criterion([loss]), torch.device("cpu"))


TINY = (
    "MODEL.BACKBONE.EMBED_DIM", "24", "MODEL.BACKBONE.DEPTH", "2", "MODEL.BACKBONE.NUM_HEADS", "3",
    "MODEL.BACKBONE.STEM_CHANNELS", "8", "MODEL.HEAD.NUM_PARTS", "3", "CLUSTERER", "null",
    "SOLVER.FROZEN", "{backbone.net.blocks.0: 1}", "SOLVER.MILESTONES", "[1]",
    "TEST.EVALUATOR", "LATransformerEvaluator", "CRITERION", "[{NAME: BottleneckCrossEntropy}]",
)  # fmt: skip


def test_a_small_run_with_both_figures_and_its_resumption(train_tiny: Callable[..., Path]) -> None:
    one = train_tiny(CONFIGS / "synthetic.yaml", "one", *TINY)
    results = json.loads((one / "results.json").read_text())["final"][0]["numbers"]
    assert {"mAP", "Rank-1", "LA mAP@10", "LA Rank-1"} <= results.keys()
    train_tiny(CONFIGS / "synthetic.yaml", "two", *TINY, "SOLVER.MAX_EPOCHS", "1")
    two = train_tiny(CONFIGS / "synthetic.yaml", "two", *TINY, resume=True,
                     allow_config_change=True)  # fmt: skip
    states = [read_checkpoint(folder / "model_final.safetensors")[0] for folder in (one, two)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
