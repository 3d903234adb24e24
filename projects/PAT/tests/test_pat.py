"""PAT by our working definition: network and losses against our own numbers; small runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid.assembly.optimization import build_learning_rate
from reid.config import load_config
from reid.modeling.losses import Criterion, CrossEntropy, Triplet
from reid.modeling.part_diversity import PartDiversity
from reid.modeling.vit import ViT
from reid.modeling.weights import read_checkpoint
from reid.projects.pat import PartPrototypeHead
from reid.structures import Batch, FeatureTokens

ROOT = Path(__file__).parents[3]
CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = {  # in the oracle's state -> here
    "prototype": "prototypes", "self_attn": "prototype_attention", "norm": "prototype_norm",
    "enc": "encoder", "q": "query", "k": "key", "v": "value", "ff1": "widen", "ff2": "narrow",
    "norm_out": "part_norm", "reduce": "reduce",
}  # fmt: skip


class Width(nn.Module):
    """A backbone as far as a head asks for one."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim


def read(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape, what
    error = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= tolerance, f"{what}: {error}"


def tokens(feature_map: Tensor) -> FeatureTokens:
    """A map (B, C, h, w) as a backbone gives it."""
    pixels = feature_map.flatten(2).transpose(1, 2)
    whole = pixels.mean(1, keepdim=True)
    return FeatureTokens(
        torch.cat((whole, pixels), 1), (feature_map.shape[2], feature_map.shape[3])
    )


def our_name(name: str) -> str:
    first, _, rest = name.partition(".")
    if first == "necks":
        number, _, rest = rest.partition(".")
        return f"part_necks.{int(number) - 1}.{rest}" if int(number) else f"neck.{rest}"
    return ".".join(filter(None, (NAMES[first], rest)))


def specified_head(a: Mapping[str, Tensor]) -> PartPrototypeHead:
    """Our head with the weights of the specification's program."""
    state = {name.removeprefix("state."): v for name, v in a.items() if name.startswith("state.")}
    count, dim = state["prototype"].shape
    head = PartPrototypeHead(
        Width(a["feature_map"].shape[1]), count, dim, int(a["heads"]), len(state["ff1.weight"])
    )
    ours = {
        our_name(name): value.flatten(1) if name == "reduce.weight" else value
        for name, value in state.items()
        if not name.startswith("cls.")
    }
    report = head.load_state_dict(ours, strict=False)
    assert not report.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in report.missing_keys)
    return head


def specified_losses(a: Mapping[str, Tensor], head: PartPrototypeHead) -> Criterion:
    """The losses of base.yaml, with the weights of the specification's classifiers."""
    classes = len(a["state.cls.0.weight"])
    common: dict[str, Any] = {"embed_dim": head.embed_dim, "num_classes": classes,
                              "smoothing": 0.1, "num_parts": head.num_parts}  # fmt: skip
    whole, parts = CrossEntropy(**common), CrossEntropy(**common, banks="parts")
    assert whole.classifier is not None
    with torch.no_grad():
        for number, layer in enumerate((whole.classifier, *parts.part_classifiers)):
            layer.weight.copy_(a[f"state.cls.{number}.weight"])
    triplets = [
        Triplet(0.3, banks=banks, num_parts=head.num_parts) for banks in ("global", "parts")
    ]
    criterion = Criterion(
        [whole, parts, *triplets, PartDiversity(num_parts=head.num_parts)],
        names=["", "part_cross_entropy", "", "part_triplet", ""],
    )
    for loss in criterion:
        loss.cluster = a["pid"].long()
    return criterion


@pytest.mark.oracle
def test_outputs_losses_and_gradients_of_the_specification(oracle_dir: Path) -> None:
    files = sorted(oracle_dir.glob("pat_spec*.npz"))
    assert files
    for path in files:
        a = read(path)
        head = specified_head(a).train()
        features = tokens(a["feature_map"].float())
        batch = Batch.of(torch.zeros(len(a["pid"]), 0))
        pixels = head.encode(features)
        found = head(features, batch)
        with torch.no_grad():
            close(head.find_parts(pixels)[1], a["mask"], f"{path} masks")
            close(found.pre[:, 0], a["global_feature"], f"{path} whole")
            close(found.pre[:, 1:], a["part_feature"], f"{path} parts")
        criterion = specified_losses(a, head)
        losses = criterion({("student", 0): found}, batch)
        sums = {
            "loss_global": losses["cross_entropy"] + losses["triplet"],
            "loss_part": losses["part_cross_entropy"] + losses["part_triplet"],
            "loss_diversity": losses["diversity"],
            "loss": torch.stack([*losses.values()]).sum(),
        }
        for name, value in sums.items():
            close(value.detach(), a[name], f"{path} {name}")
        sums["loss"].backward()
        classifiers = [criterion.losses[0].classifier, *criterion.losses[1].part_classifiers]
        for name, expected in a.items():
            if not name.startswith("grad."):
                continue
            name = name.removeprefix("grad.")
            own = (
                classifiers[int(name.split(".")[1])].weight
                if name.startswith("cls.")
                else head.get_parameter(our_name(name))
            )
            assert own.grad is not None, name
            error = (own.grad - expected.reshape(own.shape)).abs().max() / expected.abs().max()
            assert error <= 1e-5, f"{path} {name}: {float(error)}"


@pytest.mark.oracle
def test_outputs_in_double_precision(oracle_dir: Path) -> None:
    for path in sorted(oracle_dir.glob("pat_spec*.npz")):
        a = read(path)
        head = specified_head(a).double()
        with torch.no_grad():
            pixels = head.encode(tokens(a["feature_map"].double()))
            parts, mask = head.find_parts(pixels)
        close(pixels.mean(1), a["global_feature"], f"{path} whole", 1e-12)
        close(parts, a["part_feature"], f"{path} parts", 1e-12)
        close(mask, a["mask"], f"{path} masks", 1e-12)


def small_head(**options: int) -> PartPrototypeHead:
    torch.manual_seed(0)
    given = {"num_parts": 3, "dim": 8, "num_heads": 2, "hidden_dim": 16} | options
    return PartPrototypeHead(Width(5), **given)


def test_the_test_feature_joins_all_banks_after_their_necks() -> None:
    head = small_head().eval()
    with torch.no_grad():
        for neck in (head.neck, *head.part_necks):
            neck.running_mean.normal_()
        found = head(tokens(torch.randn(4, 5, 6, 2)), Batch.of(torch.zeros(4, 0)))
    assert found.pre.shape == found.post.shape == found.unit.shape == (4, 4, 8)
    expected = found.post.flatten(1) / found.post.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.test, expected)
    torch.testing.assert_close(found.unit.norm(dim=2), torch.ones(4, 4))
    assert not torch.allclose(found.pre, found.post)


def test_masks_are_shares_of_the_positions_and_know_no_places() -> None:
    head = small_head().eval()
    feature_map = torch.randn(2, 5, 6, 2)
    order = torch.randperm(12)
    moved = feature_map.flatten(2)[:, :, order].reshape(feature_map.shape)
    with torch.no_grad():
        parts, mask = head.find_parts(head.encode(tokens(feature_map)))
        others, other_mask = head.find_parts(head.encode(tokens(moved)))
    assert mask.shape == (2, 3, 12)
    torch.testing.assert_close(mask.sum(2), torch.ones(2, 3))
    torch.testing.assert_close(other_mask, mask[:, :, order])
    torch.testing.assert_close(others, parts)


def test_a_part_holds_nothing_of_its_prototype_itself() -> None:
    """With the same mask for all, the parts are the same, whatever the prototypes are."""
    head = small_head()
    with torch.no_grad():
        for layer in (head.query.weight, head.query.bias):
            layer.zero_()
        parts, mask = head.find_parts(head.encode(tokens(torch.randn(2, 5, 6, 2))))
    torch.testing.assert_close(mask, torch.full((2, 3, 12), 1 / 12))
    torch.testing.assert_close(parts, parts[:, :1].expand_as(parts))


def test_tests_without_gradients_give_what_training_gives() -> None:
    """torch takes another path through attention where no gradient is wanted."""
    head = small_head().eval()
    features = tokens(torch.randn(4, 5, 6, 2))
    batch = Batch.of(torch.zeros(4, 0))
    wanted = head(features, batch).test.detach()
    with torch.no_grad():
        torch.testing.assert_close(head(features, batch).test, wanted, rtol=0, atol=1e-5)


def test_any_map_and_a_single_image() -> None:
    head = small_head().train()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    for size in ((1, 1), (6, 2), (24, 8)):
        found = head(tokens(torch.randn(1, 5, *size)), Batch.of(torch.zeros(1, 0)))
        assert found.test.shape == (1, 4 * 8)
        assert torch.isfinite(found.test).all()
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_a_vit_gives_its_patches() -> None:
    backbone = ViT((32, 16), patch_size=8, embed_dim=24, depth=2, num_heads=3, drop_path=0.0)
    head = PartPrototypeHead(backbone, 2, 8, 2, 16)
    batch = Batch.of(torch.randn(2, 3, 32, 16))
    pixels = head.encode(backbone(batch))
    assert pixels.shape == (2, 8, 8)
    assert head(backbone(batch), batch).pre.shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 0}, "of 1 or more, got 0, 8, 2, 16"),
        ({"hidden_dim": 0}, "of 1 or more, got 3, 8, 2, 0"),
        ({"num_heads": 3}, "num_heads: expected a divisor of dim, which is 8, got 3"),
    ],
)
def test_options_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_head(**options)


@pytest.mark.parametrize("name", ["market", "duke", "msmt", "occluded_duke"])
def test_settings(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    head = {"name": "PartPrototypeHead", "num_parts": 6, "dim": 256, "num_heads": 8,
            "hidden_dim": 2048}  # fmt: skip
    assert config.model.head == head
    assert (config.input.size, config.model.backbone["last_stride"]) == ((256, 128), 1)
    assert config.input.transforms[2]["name"] == "RandomErasing"
    kinds = [(loss["name"], loss.get("banks", "global")) for loss in config.criterion]
    assert kinds == [("CrossEntropy", "global"), ("CrossEntropy", "parts"), ("Triplet", "global"),
                     ("Triplet", "parts"), ("PartDiversity", "global")]  # fmt: skip
    assert all(loss.get("weight", 1) == 1 for loss in config.criterion)
    assert [loss["smoothing"] for loss in config.criterion[:2]] == [0.1, 0.1]
    assert all(loss.get("smooth_true_class", True) for loss in config.criterion[:2])
    assert [loss["margin"] for loss in config.criterion[2:4]] == [0.3, 0.3]
    assert config.dataloader.sampler["images_per_identity"] == 4
    rate = build_learning_rate(config.solver)
    found = [rate(epoch) for epoch in (0, 10, 39, 40, 69, 70, 119)]
    assert found == pytest.approx([3.5e-5, 3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6, 3.5e-6])
    assert config.solver.optimizer == "Adam"


TINY = (
    "MODEL.BACKBONE.EMBED_DIM", "24", "MODEL.BACKBONE.DEPTH", "2", "MODEL.BACKBONE.NUM_HEADS", "3",
    "MODEL.BACKBONE.STEM_CHANNELS", "8", "MODEL.HEAD.NUM_PARTS", "2", "MODEL.HEAD.DIM", "16",
    "MODEL.HEAD.NUM_HEADS", "2", "MODEL.HEAD.HIDDEN_DIM", "32", "CLUSTERER", "null",
)  # fmt: skip
SYNTHETIC = CONFIGS / "synthetic.yaml"
LOSSES = ("cross_entropy", "part_cross_entropy", "triplet", "part_triplet", "diversity")


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What a run logged of its steps."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_a_small_run_and_its_resumption(train_tiny: Callable[..., Path]) -> None:
    one = train_tiny(SYNTHETIC, "one", *TINY)
    steps = steps_of(one)
    assert steps
    assert all(math.isfinite(line[name]) for line in steps for name in LOSSES)
    assert all(-1 <= line["diversity"] <= 1 for line in steps)
    train_tiny(SYNTHETIC, "two", *TINY, "SOLVER.MAX_EPOCHS", "1")
    two = train_tiny(SYNTHETIC, "two", *TINY, resume=True, allow_config_change=True)
    states = [read_checkpoint(folder / "model_final.safetensors")[0] for folder in (one, two)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_diversity_beside_an_unsupervised_loss(train_tiny: Callable[..., Path]) -> None:
    """It needs no labels: TMGF's parts, and clusters that leave images out."""
    criterion = "[{NAME: O2CAPLoss}, {NAME: PartDiversity, WEIGHT: 0.1}]"
    run = train_tiny(ROOT / "projects" / "TMGF" / "configs" / "synthetic.yaml", "unlabelled",
                     *TINY[:8], "CRITERION", criterion, "SOLVER.MAX_EPOCHS", "1",
                     "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2")  # fmt: skip
    steps = steps_of(run)
    assert steps
    assert all(abs(line["diversity"]) <= 0.1 for line in steps)


@pytest.mark.slow
def test_two_processes_train_as_one(
    train_in_processes: Callable[..., tuple[Path, Path]],
) -> None:
    persons = (
        "{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
        "HEIGHT: 48, WIDTH: 32}"
    )
    folders = train_in_processes(
        SYNTHETIC, *TINY, "DATASETS.TRAIN", persons, "INPUT.SIZE", "[48, 32]",
        "MODEL.BACKBONE_WEIGHTS", "''", "MODEL.BACKBONE.DROP_PATH", "0", "SOLVER.MAX_EPOCHS", "2",
        "SOLVER.MILESTONES", "[]", "SOLVER.BASE_LR", "1.0e-4", "LOG_PERIOD", "1",
        "DATALOADER.SAMPLER.BATCH_SIZE", "16", "DEVICE", "cpu",
    )  # fmt: skip
    one, two = (steps_of(folder) for folder in folders)
    assert len(one) == len(two) > 1
    for line, twin in zip(one, two, strict=True):
        for name in LOSSES:
            assert twin[name] == pytest.approx(line[name], rel=1e-4, abs=1e-5), name
