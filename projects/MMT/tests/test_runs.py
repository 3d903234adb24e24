"""MMT: whole runs with tiny networks, resumed, with two processes, and the shipped configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid.assembly.optimization import build_learning_rate
from reid.config import load_config
from reid.data.datasets.base import Split
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.engine.optimization import Optimization
from reid.engine.teacher import MeanTeacher
from reid.engine.trainer import Trainer
from reid.modeling.batchnorm import group_batch_norms
from reid.modeling.heads import Neck
from reid.modeling.losses import Criterion
from reid.modeling.weights import load_checkpoint, read_checkpoint
from reid.projects.mmt import MMTLoss
from reid.registry import ConfigError
from reid.solver import LearningRate, build_optimizer
from reid.structures import Batch, Embeddings, FeatureSet, ImageRecord, PseudoLabels
from reid.workflows.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = torch.device("cpu")
PERSONS = (
    "NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 0, "
    "IMAGES_PER_CAMERA: 2, HEIGHT: 48, WIDTH: 32"
)
BACKBONE = "{NAME: TimmBackbone, MODEL: test_resnet, LAST_STRIDE: 1}"
TINY = (
    "INPUT.SIZE", "[48, 32]", "DATALOADER.NUM_WORKERS", "0", "DEVICE", "cpu", "LOG_PERIOD", "1",
    "MODEL.BACKBONE", BACKBONE, "TEST.EVAL_PERIOD", "0", "CHECKPOINT_KEEP", "0",
)  # fmt: skip
TARGET = (
    *TINY, "DATASETS.TRAIN", f"{{{PERSONS}}}", "MODEL.WEIGHTS", "", "MODEL.STUDENTS", "['']",
    "MODEL.BN_SAMPLES_PER_GROUP", "8", "CLUSTERER.NUM_CLUSTERS", "6", "STAGES.0.REPEAT", "2",
    "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "DATALOADER.SAMPLER.BATCH_SIZE", "16",
)  # fmt: skip


@pytest.fixture
def run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Trains configs with a tiny network on tiny drawn persons, all else as they say."""
    monkeypatch.setenv("REID_DATASETS", str(tmp_path_factory.getbasetemp() / "drawn_once"))

    def work(names: list[str], output: str, *pairs: str, **options: bool) -> Path:
        folder = tmp_path / output
        files = [CONFIGS / f"{name}.yaml" for name in names]
        train(load_config(files, ["OUTPUT_DIR", str(folder), *pairs]), **options)
        return folder

    return work


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.json").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def same(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value), (where, name)


def check_same_state(whole: Path, resumed: Path) -> dict[str, Any]:
    paths = [max(folder.glob("checkpoint_*.pth")) for folder in (whole, resumed)]
    one, other = (load_checkpoint(path) for path in paths)
    for entry in ("model", "criterion"):
        same(one[entry], other[entry], entry)
    for name, student in one.get("students", {}).items():
        same(student, other["students"][name], name)
    for hook, again in zip(one["hooks"], other["hooks"], strict=True):
        if hook["name"] == "MeanTeacher":
            assert hook["first_step"] == again["first_step"]
            same(hook["teacher"], again["teacher"], "teacher")
    for number, moments in one["optimizer"]["state"].items():
        same(moments, other["optimizer"]["state"][number], f"moments {number}")
    return one


def test_a_resumed_run_is_the_uninterrupted_one(run: Callable[..., Path]) -> None:
    whole = run(["market"], "whole", *TARGET)
    names = {"cross_entropy", "triplet", "soft_cross_entropy", "soft_triplet"}
    assert all(min(line[name] for name in names) > 0 for line in lines(whole, "train"))
    stopped = run(["market"], "two", *TARGET, "STAGES.0.REPEAT", "1")
    run(["market"], "two", *TARGET, resume=True, allow_config_change=True)
    saved = check_same_state(whole, stopped)
    networks = [saved["model"], saved["students"]["student2"]]
    networks += [hook["teacher"] for hook in saved["hooks"] if hook["name"] == "MeanTeacher"]
    for number, one in enumerate(networks):
        for other in networks[number + 1 :]:
            assert any(not torch.equal(one[name], other[name]) for name in one)
    rows = [value for name, value in saved["criterion"].items() if name.endswith("weight")]
    assert len(rows) == 4
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) > 1
    steps = {float(moments["step"]) for moments in saved["optimizer"]["state"].values()}
    assert steps == {2.0}, "the optimizer is new in each epoch of two steps"
    # the first teacher is saved, both are tested
    final, _ = read_checkpoint(whole / "model_final.safetensors")
    assert all(torch.equal(networks[2][name], value) for name, value in final.items())
    results = json.loads((whole / "results.json").read_text())
    tested = [entry["test_set"] for entry in results["final"]]
    assert sorted(tested) == ["SyntheticPersons", "SyntheticPersons (teacher2)"]
    assert {entry["test_set"] for entry in results["best"]} >= {"SyntheticPersons"}


def test_another_number_of_students_does_not_resume(run: Callable[..., Path]) -> None:
    run(["market"], "one", *TARGET, "STAGES.0.REPEAT", "1")
    with pytest.raises(Exception, match="students: expected none beside the model"):
        run(["market", "variants/mean_teacher"], "one", *TARGET, "MODEL.STUDENTS", "[]",
            resume=True, allow_config_change=True)  # fmt: skip


@pytest.mark.parametrize("variant", ["dbscan", "mean_teacher", "hard_labels"])
def test_variants(run: Callable[..., Path], variant: str) -> None:
    pairs = [*TARGET, "STAGES.0.REPEAT", "1"]
    if variant == "dbscan":
        place = pairs.index("CLUSTERER.NUM_CLUSTERS")
        pairs[place : place + 2] = ["CLUSTERER.RHO", "0.05", "CLUSTERER.K1", "5"]
        pairs += ["CLUSTERER.K2", "2", "CLUSTERER.MIN_SAMPLES", "2"]
    else:
        pairs += ["MODEL.STUDENTS", "[]"]
    folder = run(["market", f"variants/{variant}"], variant, *pairs)
    (first, *_) = lines(folder, "train")
    assert ("soft_triplet" in first) == (variant != "hard_labels")
    assert first["cross_entropy"] > 0
    saved = load_checkpoint(folder / "checkpoint_0001.pth")
    assert ("students" in saved) == (variant == "dbscan")


def test_students_start_from_source_models_of_two_seeds(run: Callable[..., Path]) -> None:
    """The source's run, once for each seed; its weights are where the students start."""
    sources = ["DATASETS.SOURCE", f"{{{PERSONS}, SEED: 3}}", "DATASETS.TRAIN", f"{{{PERSONS}}}"]
    pairs = (
        *TINY, *sources, "MODEL.BACKBONE_WEIGHTS", "", "SOLVER.MAX_EPOCHS", "1",
        "MODEL.BN_SAMPLES_PER_GROUP", "8", "DATALOADER.SAMPLER.SOURCE.BATCH_SIZE", "16",
        "DATALOADER.SAMPLER.TARGET.BATCH_SIZE", "16",
        "DATALOADER.SAMPLER.TARGET.STEPS_PER_EPOCH", "2",
    )  # fmt: skip
    folders = [run(["source_market"], f"seed{seed}", *pairs, "SEED", str(seed)) for seed in (1, 2)]
    one, two = (read_checkpoint(folder / "model_final.safetensors")[0] for folder in folders)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    started = run(
        ["market"], "target", *TARGET, "STAGES.0.REPEAT", "1", "SOLVER.BASE_LR", "1.0e-12",
        "SOLVER.WEIGHT_DECAY", "0", "MODEL.WEIGHTS", str(folders[0] / "model_final.safetensors"),
        "MODEL.STUDENTS", f"['{folders[1]}/model_final.safetensors']",
    )  # fmt: skip
    saved = load_checkpoint(started / "checkpoint_0001.pth")
    for before, after in ((one, saved["model"]), (two, saved["students"]["student2"])):
        for name, value in before.items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)


def test_identities_of_the_target_are_never_looked_at(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = run(["market"], "right", *TARGET, "STAGES.0.REPEAT", "1")
    load = SyntheticPersons.load

    def wrong(self: SyntheticPersons, split: Split) -> list[ImageRecord]:
        records = load(self, split)
        if split != "train":
            return records
        return [replace(record, pid=number % 3) for number, record in enumerate(records)]

    monkeypatch.setattr(SyntheticPersons, "load", wrong)
    other = run(["market"], "wrong", *TARGET, "STAGES.0.REPEAT", "1")
    check_same_state(right, other)


@pytest.mark.slow
def test_both_domains_in_one_run_resume_inside_either_stage(run: Callable[..., Path]) -> None:
    pairs = [
        *TINY, "DATASETS.SOURCE", f"{{{PERSONS}, SEED: 3}}", "DATASETS.TRAIN", f"{{{PERSONS}}}",
        "MODEL.BACKBONE_WEIGHTS", "", "CLUSTERER.NUM_CLUSTERS", "6",
        "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "2", "DATALOADER.SAMPLER.BATCH_SIZE", "16",
        "STAGES.0.EPOCHS", "2", "STAGES.1.REPEAT", "2",
    ]  # fmt: skip
    whole = run(["synthetic"], "whole", *pairs)
    saved = load_checkpoint(whole / "checkpoint_0002.pth")
    teacher = next(hook for hook in saved["hooks"] if hook["name"] == "MeanTeacher")
    assert teacher["first_step"] is None
    same(saved["model"], teacher["teacher"], "the teacher is the student in the first stage")
    for epoch in (1, 2, 3):
        stopped = run(["synthetic"], f"at{epoch}", *pairs)
        for path in stopped.glob("checkpoint_*.pth"):
            if path.name > f"checkpoint_{epoch:04d}.pth":
                path.unlink()
        run(["synthetic"], f"at{epoch}", *pairs, resume=True)
        last = check_same_state(whole, stopped)
        assert [h["first_step"] for h in last["hooks"] if h["name"] == "MeanTeacher"] == [4, 4]


class Small(nn.Module):
    """A linear layer and a neck."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)
        self.neck = Neck(8)

    def forward(self, batch: Batch) -> Embeddings:
        raw = self.layer(batch.image.flatten(1))
        out = self.neck(raw)
        unit = F.normalize(out, dim=1)
        return Embeddings(raw[:, None], out[:, None], unit[:, None], unit)


class Batches(list[Batch]):
    """A loader of given batches."""

    @property
    def batch_sampler(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the batches are the same in every epoch."""


def stepped(rank: int, world_size: int) -> dict[str, Tensor]:
    """All four networks and their classifiers after three steps with a share of batches of 16."""
    torch.manual_seed(0)
    students = {"student": Small(), "student2": Small()}
    for student in students.values():
        group_batch_norms(student, 4)
    index = torch.arange(16)
    criterion = Criterion([MMTLoss(8)])
    criterion.set_labels(
        PseudoLabels.from_clusters(index // 4), FeatureSet.of(F.normalize(torch.randn(16, 8)))
    )
    share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
    loader: Any = Batches()
    for _ in range(3):
        one, other = torch.randn(2, 16, 3, 2, 2)
        batch = Batch.of(one, index=index)._replace(views=(other,))
        loader.append(batch.map(lambda column: column[share]))
    parameters = [p for net in students.values() for p in net.named_parameters()]
    optimizer = build_optimizer([*parameters, *criterion.named_parameters()], "SGD", lr=0.01)
    trainer = Trainer(
        students["student"], criterion, Optimization(optimizer, LearningRate(0.01, 1), CPU),
        loader, max_epochs=1, device=CPU, more_students={"student2": students["student2"]},
        hooks=[
            MeanTeacher(0.9, statistics="own"),
            MeanTeacher(0.9, statistics="own", student="student2", teacher="teacher2"),
        ],
    )  # fmt: skip
    trainer.train()
    networks = {**students, **trainer.networks, "criterion": criterion}
    return {
        f"{role}.{name}": value
        for role, network in networks.items()
        for name, value in network.state_dict().items()
    }


def test_two_processes_train_as_one(in_two_processes: Callable[..., list[Any]]) -> None:
    expected = stepped(0, 1)
    assert sum(name.endswith("layer.weight") for name in expected) == 4
    for found in in_two_processes(stepped):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "means", "train_set", "source"),
    [
        ("market", 500, "Market1501", "DukeMTMCreID"),
        ("duke", 700, "DukeMTMCreID", "Market1501"),
        ("msmt", 1000, "MSMT17", "DukeMTMCreID"),
        ("msmt_from_market", 1000, "MSMT17", "Market1501"),
    ],
)
def test_published_hyper_parameters(name: str, means: int, train_set: str, source: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.clusterer == {
        "name": "KMeans", "num_clusters": means, "spherical": False, "restarts": 10,
        "iterations": 100, "seed": 1,
    }  # fmt: skip
    assert config.criterion == [
        {"name": "MMTLoss", "students": 2, "smoothing": 0.1, "soft_ce_weight": 0.5,
         "soft_triplet_weight": 0.8}
    ]  # fmt: skip
    assert config.dataloader.sampler == {
        "name": "CrossCameraSampler", "batch_size": 64, "images_per_identity": 4,
        "steps_per_epoch": 400,
    }  # fmt: skip
    one, two, choice = config.hooks
    assert (one["momentum"], one["ramp"], one["statistics"]) == (0.999, True, "own")
    assert {**one, "student": "student2", "teacher": "teacher2"} == two
    assert choice["cluster"] == choice["test"] == ["teacher", "teacher2"]
    assert not choice["normalize"], "K-means takes the mean of the two unit features as it is"
    solver = config.solver
    assert (solver.optimizer, solver.base_lr, solver.weight_decay) == ("Adam", 3.5e-4, 5e-4)
    assert solver.max_epochs == 40
    assert [stage.epochs for stage in config.stage_settings] == [1], "Adam is new in each epoch"
    assert config.model.bn_samples_per_group == 16
    assert not config.model.backbone["stem_activation"]
    assert config.datasets.train == {"name": train_set}
    start = load_config(CONFIGS / f"source_{name}.yaml")
    assert start.datasets.source == {"name": source}
    assert start.datasets.train == config.datasets.train
    assert config.model.weights == f"{start.output_dir}/model_final.safetensors"
    assert config.model.students == [config.model.weights.replace("seed1", "seed2")]
    rate = build_learning_rate(start.solver)
    ahead = [e + 1 for e in range(80)]  # the published counter
    expected = [
        (0.01 * (1 - e / 10) + e / 10 if e < 10 else 1.0) * 0.1 ** sum(e >= m for m in (40, 70))
        for e in ahead
    ]
    found = [rate(epoch) / 3.5e-4 for epoch in range(start.solver.max_epochs)]
    assert found == pytest.approx(expected)
    assert start.dataloader.sampler["target"]["steps_per_epoch"] == 100


def test_variants_change_what_they_say() -> None:
    base = CONFIGS / "market.yaml"
    dbscan = load_config([base, CONFIGS / "variants" / "dbscan.yaml"])
    assert dbscan.clusterer == {
        "name": "RerankedDBSCAN", "k1": 20, "k2": 6, "eps": "rho", "rho": 1.6e-3,
        "source_weight": 0.0, "min_samples": 4,
    }  # fmt: skip
    assert dbscan.hooks[2]["normalize"], "DBSCAN takes unit features"
    ibn = load_config([base, CONFIGS / "variants" / "ibn.yaml"])
    assert ibn.model.backbone["norm"] == "ibn"
    assert ibn.model.backbone["stem_activation"]
    start = load_config([CONFIGS / "source_market.yaml", CONFIGS / "variants" / "ibn_source.yaml"])
    assert start.model.backbone == ibn.model.backbone
    with pytest.raises(ConfigError, match=r"model\.students"):
        load_config(base, ["MODEL.STUDENTS", "3"])
