"""TransReID-SSL, supervised: the published settings, small runs, cameras of any numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from reid.assembly import network as networks
from reid.config import Config, load_config
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.modeling.weights import read_checkpoint, save_checkpoint
from reid.workflows.evaluate import evaluate as run_test
from reid.workflows.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "DATALOADER.NUM_WORKERS", "0", "DATALOADER.SAMPLER.BATCH_SIZE", "16", "INPUT.SIZE", "[32, 16]",
    "MODEL.BACKBONE.EMBED_DIM", "24", "MODEL.BACKBONE.DEPTH", "2", "MODEL.BACKBONE.NUM_HEADS", "3",
    "MODEL.BACKBONE.STEM_CHANNELS", "8", "MODEL.BACKBONE_WEIGHTS", "", "SOLVER.AMP", "off",
    "SOLVER.MAX_EPOCHS", "1", "DEVICE", "cpu", "LOG_PERIOD", "100",
]  # fmt: skip
PERSONS = ("{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 4, NUM_CAMERAS: 3, "
           "NUM_DISTRACTORS: 2, HEIGHT: 32, WIDTH: 16}")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stem", "dim", "heads", "size", "lr", "warmup"),
    [
        ("market", "ibn", 384, 6, [256, 128], 4e-4, 20),
        ("msmt", "ibn", 384, 6, [256, 128], 4e-4, 20),
        ("market_vitb", "ibn", 768, 12, [384, 128], 4e-4, 20),
        ("msmt_vitb", "ibn", 768, 12, [384, 128], 4e-4, 20),
        ("imagenet_market", "patches", 768, 12, [256, 128], 8e-3, 5),
        ("imagenet_duke", "patches", 768, 12, [256, 128], 8e-3, 5),
        ("imagenet_msmt", "patches", 768, 12, [256, 128], 8e-3, 5),
    ],
)
def test_published_settings(
    name: str, stem: str, dim: int, heads: int, size: list[int], lr: float, warmup: int
) -> None:
    config = load_config(CONFIGS / f"supervised_{name}.yaml")
    backbone, solver = config.model.backbone, config.solver
    assert [backbone["stem"], backbone["embed_dim"], backbone["num_heads"]] == [stem, dim, heads]
    assert (backbone["depth"], backbone["drop_path"]) == (12, 0.1)
    assert (backbone["camera_embedding"], backbone["camera_scale"]) == (False, 3.0)
    assert config.model.head == {"name": "BNNeckHead", "neck_feature": "before"}
    assert config.criterion == [
        {"name": "CrossEntropy", "smoothing": 0.0, "init_std": 0.001},
        {"name": "Triplet", "margin": None},
    ]
    assert [solver.optimizer, solver.base_lr, solver.bias_lr_factor, solver.momentum,
            solver.weight_decay, solver.max_epochs, solver.schedule, solver.final_lr_factor,
            solver.cosine_after_warmup, solver.warmup_epochs, solver.warmup_factor,
            solver.warmup_iterations, solver.amp, config.seed] == [
        "SGD", lr, 2, 0.9, 1e-4, 120, "cosine", 0.002, False, warmup, 0.01, 0, "fp16",
        1234]  # fmt: skip
    assert config.dataloader.sampler == {"name": "RandomIdentitySampler", "batch_size": 64,
                                         "images_per_identity": 4, "epoch": "round"}  # fmt: skip
    assert config.input.size == tuple(size)
    assert config.input.pixel_mean == config.input.pixel_std == (0.5, 0.5, 0.5)
    assert (config.input.interpolation, config.input.test_interpolation) == ("bicubic", "bilinear")
    flip, crop, erasing = config.input.transforms
    assert (flip, crop) == ({"name": "RandomFlip", "prob": 0.5}, {"name": "PadCrop", "pad": 10})
    assert (erasing["name"], erasing["prob"], erasing["fill"]) == ("RandomErasing", 0.5, "noise")
    assert erasing["area"] == pytest.approx([0.02, 1 / 3])
    assert erasing["aspect"] == pytest.approx([0.3, 1 / 0.3])


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    return tmp_path


def small(folder: Path, dataset: str, *pairs: str) -> Config:
    return load_config(
        CONFIGS / "supervised_market.yaml",
        [*SMALL, "DATASETS.TRAIN", dataset, "OUTPUT_DIR", str(folder), *pairs],
    )


def list_of(root: Path, name: str, camera: dict[int, int | str]) -> str:
    """A CSV list of drawn persons, cameras renamed; query and gallery are the test persons'."""
    persons = SyntheticPersons(num_train=8, num_test=4, num_cameras=3, num_distractors=2, height=32,
                               width=16)  # fmt: skip
    rows = ["path,pid,camid,split"]
    for split in ("train", "query", "gallery"):
        rows += [
            f"{Path(record.path).relative_to(root)},{record.pid},"
            f"{camera[record.camid] if split == 'train' else record.camid},{split}"
            for record in persons.load(split)  # type: ignore[arg-type]
        ]
    (root / f"{name}.csv").write_text("\n".join(rows) + "\n")
    return f"{{NAME: CSV, PATH: {name}.csv}}"


def test_a_small_run(tmp_path: Path) -> None:
    pairs = "SOLVER.MAX_EPOCHS", "3", "SOLVER.WARMUP_EPOCHS", "1"
    train(small(tmp_path / "run", PERSONS, *pairs))
    written = (tmp_path / "run" / "metrics.json").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["epoch"] for line in steps] == [0, 1, 2]
    cosine = [0.002 + 0.499 * (1 + math.cos(math.pi * t / 3)) for t in (1, 2)]
    assert [line["lr"] for line in steps] == pytest.approx([4e-4 * f for f in (0.01, *cosine)])
    assert all(math.isfinite(line["triplet"]) for line in steps)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 < results["final"][0]["numbers"]["mAP"] <= 1
    state, _ = read_checkpoint(tmp_path / "run" / "model_final.safetensors")
    assert "backbone.camera_embed" not in state


SIE = ("MODEL.BACKBONE.CAMERA_EMBEDDING", "true")


@pytest.mark.parametrize(
    ("camera", "rows", "trained"),
    [
        ({0: 0, 1: 3, 2: 7}, 8, {0, 3, 7}),  # gaps; cameras 1 and 2 are only in the tests
        ({0: 12, 1: 12, 2: 12}, 13, {12}),  # one camera, and two digits
        ({0: "", 1: "", 2: ""}, 0, set()),  # unknown
    ],
    ids=["gaps", "one of two digits", "unknown"],
)
def test_camera_embeddings_of_any_cameras(
    tmp_path: Path, camera: dict[int, int | str], rows: int, trained: set[int]
) -> None:
    """Trains and tests; the embedding of a camera without training images stays exactly zero."""
    train(small(tmp_path / "run", list_of(tmp_path, "own", camera), *SIE))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 < results["final"][0]["numbers"]["mAP"] <= 1
    weights = tmp_path / "run" / "model_final.safetensors"
    state, _ = read_checkpoint(weights)
    table = state.get("backbone.camera_embed", torch.zeros(0, 1, 24))
    assert len(table) == rows
    assert {int(row) for row in table.any(2).any(1).nonzero()} == trained
    again = run_test(
        small(tmp_path / "test", "{NAME: CSV, PATH: own.csv}", *SIE, "MODEL.WEIGHTS", str(weights))
    )
    (numbers,) = again.values()
    assert numbers == pytest.approx(results["final"][0]["numbers"])


def test_checkpoints_of_the_authors_layout_load(tmp_path: Path) -> None:
    config = small(tmp_path / "run", PERSONS, *SIE)
    model = networks.build_model(config, (32, 16), num_cameras=3)
    theirs: dict[str, Any] = {"classifier.weight": torch.zeros(8, 24)}
    for name, tensor in model.state_dict().items():
        name = name.replace("head.neck.", "bottleneck.").replace("backbone.net.", "base.")
        theirs[name.replace("backbone.camera_embed", "base.sie_embed")] = tensor + 1
    save_checkpoint(tmp_path / "theirs.pth", theirs)
    config.model.weights = str(tmp_path / "theirs.pth")
    model = networks.build_trained_model(config, (32, 16))
    for name, tensor in model.state_dict().items():
        foreign = name.replace("head.neck.", "bottleneck.").replace("backbone.net.", "base.")
        assert torch.equal(
            tensor, theirs[foreign.replace("backbone.camera_embed", "base.sie_embed")]
        )
