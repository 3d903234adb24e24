"""Runs that something goes wrong with: signals, losses, clusters, disks, loader workers."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from reid import distributed
from reid.config import Config, load_config
from reid.engine.hooks.checkpoints import checkpoint_paths, newest_checkpoint
from reid.engine.metrics import show_picture
from reid.engine.stopping import Interrupted
from reid.engine.trainer import Trainer
from reid.files import OutputError
from reid.labelling import ClusteringError
from reid.modeling.losses import Loss
from reid.modeling.weights import WeightsError, read_checkpoint
from reid.registry import CLUSTERER, HOOK, LOSS, ConfigError, Hook
from reid.structures import Batch, DataError, Embeddings, FeatureSet, PseudoLabels
from reid.workflows.train import train

CONFIG = """
DATASETS:
  TRAIN: {NAME: SyntheticPersons, NUM_TRAIN: 6, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2,
          HEIGHT: 32, WIDTH: 16}
INPUT: {SIZE: [32, 16]}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {NAME: PKSampler, BATCH_SIZE: 8, STEPS_PER_EPOCH: 3}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CRITERION: [CrossEntropy, BrokenAt]
SOLVER: {OPTIMIZER: Adam, MAX_EPOCHS: 3, WARMUP_EPOCHS: 1, MILESTONES: [2]}
HOOKS: [Mishap]
DEVICE: cpu
LOG_PERIOD: 2
"""
MISHAPS: dict[str, Callable[[Trainer], None]] = {}


@HOOK.register()
class Mishap(Hook):
    """Calls what `MISHAPS` has for `epoch1`, `step5`, `after2` or `end`."""

    def before_epoch(self, trainer: Trainer) -> None:
        MISHAPS.get(f"epoch{trainer.epoch}", lambda trainer: None)(trainer)

    def after_step(self, trainer: Trainer) -> None:
        MISHAPS.get(f"step{trainer.step}", lambda trainer: None)(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        MISHAPS.get(f"after{trainer.epoch}", lambda trainer: None)(trainer)

    def after_train(self, trainer: Trainer) -> None:
        MISHAPS.get("end", lambda trainer: None)(trainer)


BROKEN: list[int] = []


@LOSS.register()
class BrokenAt(Loss):
    """A loss of zero, whose value and gradient are NaN at the steps in `BROKEN`."""

    def __init__(self, embed_dim: int = 0) -> None:
        super().__init__()
        self.steps = 0
        self.register_buffer("statistic", torch.zeros(()), persistent=False)

    def forward(self, embeddings: Embeddings, batch: Batch) -> dict[str, Tensor]:
        self.steps += 1
        factor = math.nan if self.steps in BROKEN else 0.0
        loss = embeddings.pre[:, 0].sum() * factor
        self.statistic += loss.detach() + 1
        return {"fragile": loss}


CLUSTERS: list[int] = []


@CLUSTERER.register()
class GivenClusters:
    """Makes as many clusters in each call as `CLUSTERS` says."""

    def __call__(self, features: FeatureSet, progress: object = None) -> PseudoLabels:
        count = CLUSTERS.pop(0)
        if not count:
            raise ClusteringError("no cluster: raise eps")
        return PseudoLabels.from_clusters(torch.arange(len(features)) % count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("mishaps")
    (root / "run.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATASETS", str(root / "datasets"))
        yield root


@pytest.fixture(autouse=True)
def nothing_happens() -> Iterator[None]:
    yield
    MISHAPS.clear()
    BROKEN.clear()
    CLUSTERS.clear()


def config(folder: Path, output: str, *pairs: Any) -> Config:
    return load_config(folder / "run.yaml", ["OUTPUT_DIR", str(folder / output), *map(str, pairs)])


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_paths(folder)]


def final(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(folder / "model_final.safetensors")[0]


def check_same_end(folder: Path, output: str) -> None:
    whole = folder / "whole"
    if not whole.exists():
        train(config(folder, "whole"))
    expected, found = final(whole), final(folder / output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def send(signum: int) -> Callable[[Trainer], None]:
    return lambda trainer: os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    ("signum", "moment", "code"),
    [
        (signal.SIGHUP, "step4", 129),
        (signal.SIGUSR1, "step5", 138),
        (signal.SIGTERM, "step3", 143),  # the last of an epoch
        (signal.SIGTERM, "after1", 143),
        (signal.SIGTERM, "step5", 143),
        (signal.SIGINT, "epoch1", 130),
    ],
)
def test_a_signal_ends_the_run_with_the_last_whole_epoch(
    folder: Path, signum: int, moment: str, code: int
) -> None:
    """With this period, only the end of the run would write a checkpoint."""
    output = f"signal_{moment}_{code}"
    MISHAPS[moment] = send(signum)
    handler = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=r"checkpoint_0001\.pth holds the last whole") as info:
        train(config(folder, output, "CHECKPOINT_PERIOD", 10))
    assert info.value.exit_code == code
    assert signal.getsignal(signum) is handler
    assert names(folder / output) == ["checkpoint_0001.pth"]
    assert "has ended the run" in (folder / output / "log.txt").read_text()
    MISHAPS.clear()
    train(config(folder, output, "CHECKPOINT_PERIOD", 10), resume=True)
    assert names(folder / output) == ["checkpoint_0003.pth", "checkpoint_0001.pth"]
    check_same_end(folder, output)


def test_a_signal_in_a_step_waits_for_its_end(folder: Path) -> None:
    seen = []
    MISHAPS["step2"] = lambda trainer: (send(signal.SIGTERM)(trainer), seen.append("on"))[0]
    MISHAPS["step3"] = lambda trainer: seen.append("too far")
    with pytest.raises(Interrupted, match=r"no epoch was finished.*--resume starts over"):
        train(config(folder, "in_a_step"))
    assert seen == ["on"]
    assert names(folder / "in_a_step") == []
    MISHAPS.clear()
    train(config(folder, "in_a_step"), resume=True)
    check_same_end(folder, "in_a_step")


def test_only_the_main_process_names_the_last_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others cannot know the last checkpoint: it may be written while they end."""

    def become_another(trainer: Trainer) -> None:
        monkeypatch.setattr(distributed, "is_main", lambda: False)
        send(signal.SIGTERM)(trainer)

    MISHAPS["step2"] = become_another
    with pytest.raises(Interrupted, match=r"^SIGTERM has ended the run$"):
        train(config(folder, "another"))


def test_a_signal_while_a_checkpoint_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def interrupted_save(state: dict[str, Any], file: Any) -> None:
        if state["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        save(state, file)

    monkeypatch.setattr("torch.save", interrupted_save)
    with pytest.raises(Interrupted, match=r"checkpoint_0002\.pth"):
        train(config(folder, "in_a_checkpoint"))
    found = newest_checkpoint(folder / "in_a_checkpoint")
    assert found is not None
    assert found[1]["epoch"] == 2


def test_the_checkpoint_before_a_damaged_one_is_used(folder: Path) -> None:
    target = folder / "torn"
    MISHAPS["epoch2"] = send(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(config(folder, "torn"))
    content = bytearray((target / "checkpoint_0002.pth").read_bytes())
    content[len(content) // 2] ^= 1  # torch reads the damaged file without an error
    torch.load(target / "checkpoint_0002.pth", weights_only=True)  # would be refused
    (target / "checkpoint_0002.pth").write_bytes(content)
    torch.load(target / "checkpoint_0002.pth", weights_only=True)
    (target / ".checkpoint_0003.pth.abcd_123.part").write_bytes(b"left by a kill")
    MISHAPS.clear()
    train(config(folder, "torn"), resume=True)
    log = (target / "log.txt").read_text()
    assert "checkpoint_0002.pth: is broken or cut off (the checksum of" in log
    assert "checkpoint_0001.pth instead, which is whole" in log
    assert list(target.glob(".*")) == []
    check_same_end(folder, "torn")
    for path in target.glob("checkpoint*"):
        path.write_bytes(content[:1000])
    with pytest.raises(WeightsError, match="no checkpoint is whole; --overwrite starts over"):
        train(config(folder, "torn"), resume=True)


def test_checkpoints_are_kept_as_configured_and_overwritten_with_all_else(folder: Path) -> None:
    run = folder / "keep"
    train(config(folder, "keep", "CHECKPOINT_KEEP", 0))
    assert names(run) == [f"checkpoint_000{epoch}.pth" for epoch in (3, 2, 1)]
    Image.new("RGB", (4, 4)).save(folder / "drawn_later.png")
    show_picture(run, folder / "drawn_later.png")
    train(config(folder, "keep", "CHECKPOINT_KEEP", 1), overwrite=True)
    assert names(run) == ["checkpoint_0003.pth"]
    assert {"model_best.safetensors", "model_final.safetensors"} <= {
        path.name for path in run.iterdir()
    }
    assert len(list(run.rglob("events.out.tfevents.*"))) == 1


def test_results_without_a_checkpoint_are_not_overwritten(folder: Path) -> None:
    target = folder / "results_only"
    target.mkdir()
    (target / "results.json").write_text("{}")
    for options, message in [({}, "holds a run"), ({"resume": True}, "no checkpoint to resume")]:
        with pytest.raises(ConfigError, match=message):
            train(config(folder, "results_only"), **options)
    assert (target / "results.json").read_text() == "{}"


def test_a_changed_config_is_shown_and_must_be_allowed(folder: Path) -> None:
    MISHAPS["epoch1"] = send(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(config(folder, "changed"))
    MISHAPS.clear()
    other = ("SOLVER.BASE_LR", 1e-5, "LOG_PERIOD", 3)
    with pytest.raises(ConfigError, match="had other settings") as info:
        train(config(folder, "changed", *other), resume=True)
    for line in ("-  BASE_LR: 0.00035", "+  BASE_LR: 1.0e-05", "--allow-config-change"):
        assert line in str(info.value)
    assert "BASE_LR: 0.00035" in (folder / "changed" / "config.yaml").read_text()
    train(config(folder, "changed", *other), resume=True, allow_config_change=True)
    log = (folder / "changed" / "log.txt").read_text()
    assert "Settings have changed since this run began" in log
    lines = [json.loads(n) for n in (folder / "changed" / "metrics.json").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates == pytest.approx([3.5e-6, 3.5e-6, 1e-5, 1e-6])  # with another warm-up and gamma
    # The period of the log may change without permission.
    train(config(folder, "changed", "LOG_PERIOD", 1, *other[:2]), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_reported(folder: Path) -> None:
    BROKEN.append(5)
    with pytest.raises(FloatingPointError, match=r"step 5, epoch 2: the loss is not finite \(loss"):
        train(config(folder, "nan"))
    report = json.loads((folder / "nan" / "nonfinite_step5.json").read_text())
    assert report["losses"]["fragile"] == "nan"
    assert report["losses"]["cross_entropy"] > 0
    assert (report["step"], report["epoch"], report["lr"]) == (5, 2, pytest.approx(3.5e-4))
    assert len(report["images"]) == 8
    assert all(Path(path).is_file() for path in report["images"])
    largest = [entry["largest"] for entry in report["activations"]]
    assert largest == sorted(largest, reverse=True)
    assert largest[0] > 0
    assert report["first_module_not_finite"] is None
    assert report["parameters_not_finite"] == []
    found = newest_checkpoint(folder / "nan")
    assert found is not None
    assert found[1]["epoch"] == 1
    BROKEN.clear()
    train(config(folder, "nan"), resume=True)
    check_same_end(folder, "nan")


def test_batches_are_skipped_up_to_a_limit(folder: Path) -> None:
    BROKEN.extend([2, 5, 7])
    skip = ("SOLVER.ON_NONFINITE", "skip", "SOLVER.MAX_SKIPPED", 2)
    with pytest.raises(FloatingPointError, match=r"step 7, epoch 3.*after 2 skipped batches"):
        train(config(folder, "skip", *skip))
    log = (folder / "skip" / "log.txt").read_text()
    assert "step 5, epoch 2: the loss is not finite" in log
    assert "number 2 of at most 2" in log
    assert len(list((folder / "skip").glob("nonfinite_step*.json"))) == 3
    found = newest_checkpoint(folder / "skip")
    assert found is not None
    assert found[1]["skipped"] == 2
    numbers = (folder / "skip" / "metrics.json").read_text()
    assert "NaN" not in numbers
    BROKEN.clear()
    train(config(folder, "skip", *skip), resume=True)
    assert all(bool(value.isfinite().all()) for value in final(folder / "skip").values())


def test_a_model_that_is_not_finite_is_not_saved(folder: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        next(iter(trainer.model.parameters())).data[0] = math.inf

    MISHAPS["step6"] = spoil
    with pytest.raises(
        FloatingPointError, match=r"epoch 2: .* 1 of .* not finite: model\.backbone"
    ):
        train(config(folder, "spoilt"))
    assert names(folder / "spoilt") == ["checkpoint_0001.pth"]


@pytest.mark.parametrize("count", [0, 1])
def test_labels_are_kept_where_clusters_collapse(folder: Path, count: int) -> None:
    pairs = ("CLUSTERER", "GivenClusters", "CRITERION", "[Triplet]")
    output = f"collapse{count}"
    CLUSTERS.extend([5, count, 4])
    train(config(folder, output, *pairs, "ON_COLLAPSE", "keep"))
    lines = [json.loads(n) for n in (folder / output / "metrics.json").read_text().splitlines()]
    labels = [line for line in lines if line["kind"] == "labels"]
    assert [line["clusters"] for line in labels] == [5, 5, 4]
    assert [line.get("kept") for line in labels] == [None, 1, None]
    log = (folder / output / "log.txt").read_text()
    assert "WARNING: epoch 2: " in log
    assert "This epoch uses the last epoch's labels again" in log
    # A run that resumes just before the collapse needs the labels of the epoch before it.
    for path in checkpoint_paths(folder / output)[:-1]:
        path.unlink()
    expected = final(folder / output)
    (folder / output / "model_final.safetensors").unlink()
    CLUSTERS.append(4)
    train(config(folder, output, *pairs, "ON_COLLAPSE", "keep"), resume=True)
    assert all(torch.equal(expected[k], v) for k, v in final(folder / output).items())


def test_a_collapse_in_the_first_epoch_or_with_stop_ends_the_run(folder: Path) -> None:
    pairs = ("CLUSTERER", "GivenClusters", "CRITERION", "[Triplet]", "ON_COLLAPSE")
    for number, (clusters, word, message) in enumerate(
        [
            ([0], "keep", "epoch 1: no cluster: raise eps"),
            ([1], "keep", "epoch 1: there is only one cluster, of all 43 images .*; other options"),
            ([5, 1], "stop", "epoch 2: there is only one cluster, of all 43 images"),
            ([5, 0], "warn", "epoch 2: no cluster"),
        ]
    ):
        CLUSTERS[:] = clusters
        with pytest.raises(ClusteringError, match=message):
            train(config(folder, f"no_labels{number}", *pairs, word))
    CLUSTERS[:] = [5, 1, 5]
    train(config(folder, "one_cluster", *pairs, "warn"))
    assert all(bool(value.isfinite().all()) for value in final(folder / "one_cluster").values())
    assert (
        "epoch 2: there is only one cluster, of all 43 images that are not outliers"
        in (folder / "one_cluster" / "log.txt").read_text()
    )


def test_a_full_disk_leaves_the_earlier_checkpoint(folder: Path) -> None:
    """The system refuses files as large as a checkpoint; the log files are smaller."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    MISHAPS["epoch1"] = lambda trainer: resource.setrlimit(
        resource.RLIMIT_FSIZE, (2**20, before[1])
    )
    try:
        with pytest.raises(OutputError, match=r"checkpoint_0002\.pth: cannot be written \(File to"):
            train(config(folder, "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(folder / "full") == ["checkpoint_0001.pth"]
    assert list((folder / "full").glob(".*")) == []
    MISHAPS.clear()
    train(config(folder, "full"), resume=True)
    check_same_end(folder, "full")


def fail(trainer: Trainer) -> None:
    raise DataError("gone")


def test_an_error_after_training_leaves_the_final_weights(folder: Path) -> None:
    MISHAPS["end"] = fail
    with pytest.raises(DataError, match="gone"):
        train(config(folder, "error_at_the_end"))
    MISHAPS.clear()
    check_same_end(folder, "error_at_the_end")


def test_an_error_writes_the_epoch_that_was_not_saved(folder: Path) -> None:
    MISHAPS["step7"] = fail
    with pytest.raises(DataError, match="gone"):
        train(config(folder, "error", "CHECKPOINT_PERIOD", 10))
    assert names(folder / "error") == ["checkpoint_0002.pth"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(("writer", "file"), [
    ("reid.engine.metrics.open_to_append", r"metrics\.json"),
    ("reid.engine.metrics.RecordWriter.write", r"events\.out\.tfevents\.[^/:]+"),
])  # fmt: skip
def test_metrics_that_cannot_be_written_are_named(
    folder: Path, number: int, writer: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(trainer: Trainer) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(writer, fail)

    MISHAPS["step4"] = refuse
    output = f"refused{number}_{writer}"
    with pytest.raises(OutputError, match=rf"{file}: cannot .* \({os.strerror(number)}\)"):
        train(config(folder, output))
    assert names(folder / output) == ["checkpoint_0001.pth"]


def test_an_output_folder_that_cannot_be_made_is_named_at_once(folder: Path) -> None:
    (folder / "a_file").write_text("")
    with pytest.raises(
        OutputError, match=r"a_file/run: cannot be written \((Not a directory|File exists)\)"
    ):
        train(config(folder, "a_file/run"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_vanishes_is_named(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reid.assembly.images._num_workers", lambda config: workers)
    train_folder = next((folder / "datasets").glob("*/*/bounding_box_train"))
    aside = train_folder.with_name("aside")
    MISHAPS["epoch1"] = lambda trainer: (shutil.move(train_folder, aside), None)[1]
    try:
        with pytest.raises(DataError) as info:
            train(config(folder, f"vanished{workers}"))
    finally:
        aside.rename(train_folder)
    assert str(info.value).startswith(str(train_folder))
    assert "no such file" in str(info.value)
    assert names(folder / f"vanished{workers}") == ["checkpoint_0001.pth"]


def test_a_dead_reading_process_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reid.assembly.images._num_workers", lambda config: 1)
    pairs = ("DATALOADER.SAMPLER.STEPS_PER_EPOCH", 30)

    def kill(trainer: Trainer) -> None:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    MISHAPS["step32"] = kill
    with pytest.raises(DataError, match=r"process that reads images has died .*num_workers"):
        train(config(folder, "dead", *pairs))
    assert names(folder / "dead") == ["checkpoint_0001.pth"]


def test_a_lost_connection_to_a_reading_process_is_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment, torch still takes a killed process for alive."""

    def lose(self: object, data: object, index: int) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("reid.assembly.images._num_workers", lambda config: 1)
    monkeypatch.setattr(
        "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._process_data", lose
    )
    with pytest.raises(DataError, match=r"process that reads images has died .*num_workers"):
        train(config(folder, "lost"))


def test_other_lost_connections_are_not(folder: Path) -> None:
    def lose(trainer: Trainer) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    MISHAPS["step2"] = lose
    with pytest.raises(ConnectionResetError):
        train(config(folder, "another"))


def test_a_config_file_in_the_output_folder_is_not_overwritten(tmp_path: Path) -> None:
    own = tmp_path / "exp" / "config.yaml"
    own.parent.mkdir()
    own.write_text("SEED: 3\n")
    for file in (own, None):  # the config file itself, or a file that no run has written
        with pytest.raises(ConfigError, match=r"config\.yaml' (is the config file itself|exists)"):
            train(load_config(file, ["OUTPUT_DIR", str(own.parent)]))
    child = tmp_path / "child.yaml"
    child.write_text(f"_BASE_: {own}\n")
    (own.parent / "log.txt").touch()
    with pytest.raises(ConfigError, match="is the config file itself"):
        train(load_config(child, ["OUTPUT_DIR", str(own.parent)]))
    assert own.read_text() == "SEED: 3\n"


def test_an_output_folder_among_the_images_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    (tmp_path / "own" / "door").mkdir(parents=True)
    shutil.copy(next((folder / "datasets").rglob("*.jpg")), tmp_path / "own" / "door" / "1.jpg")
    settings = config(folder, "inside", "DATASETS.TRAIN", "{NAME: Folder, PATH: own}")
    settings.output_dir = str(tmp_path / "own" / "logs")
    with pytest.raises(ConfigError, match=r"own/logs' lies in .*own, where "):
        train(settings)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "own" / "linked").symlink_to(tmp_path / "elsewhere")
    settings.output_dir = str(tmp_path / "elsewhere" / "logs")
    with pytest.raises(ConfigError, match=r"logs' lies in .*elsewhere, where "):
        train(settings)


def put(hook: str, *path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value into a hook's part of a checkpoint."""

    def forge(state: dict[str, Any]) -> None:
        node: Any = next(own for own in state["hooks"] if own["name"] == hook)
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return forge


def evaluation(**changes: Any) -> list[dict[str, Any]]:
    return [{"test_set": "SyntheticPersons", "epoch": 1, "numbers": {"mAP": 0.5}, **changes}]


FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a later epoch": (lambda state: state.update(epoch=99), "epoch: expected 2 as .* got 99"),
    "a list as teacher": (put("MeanTeacher", "teacher", value=[1]), "MeanTeacher: teacher"),
    "no teacher": (put("MeanTeacher", "teacher", value=None), "MeanTeacher"),
    "a teacher of NaN": (
        put("MeanTeacher", "teacher", "head.neck.weight", value=torch.full((96,), math.nan)),
        r"teacher\.head\.neck\.weight: expected finite values",
    ),
    "a teacher's variance": (
        put("MeanTeacher", "teacher", "head.neck.running_var", value=torch.full((96,), -1.0)),
        r"teacher\.head\.neck\.running_var: a variance is below 0",
    ),
    "labels in a list": (put("RefreshPseudoLabels", "labels", value=[1]), "RefreshPseudoLabels"),
    "a cluster of 10^12": (
        lambda state: state["hooks"][1]["labels"].update(
            cluster=torch.full((43,), 10**12), proxy=torch.zeros(43, dtype=torch.int64),
            proxy_to_cluster=torch.tensor([10**12]), proxy_to_camera=torch.tensor([-1]),
        ),
        "`cluster` must use each number from 0",
    ),
    "evaluations to come": (put("Evaluate", "history", value=evaluation(epoch=3)), "epoch: got 3"),
    "a number of 400 digits": (
        put("Evaluate", "history", value=evaluation(numbers={"mAP": 10**400})), "numbers: got"
    ),
    "more in an evaluation": (
        put("Evaluate", "history", value=evaluation(more=torch.zeros(1))), "expected test_set"
    ),
    "a word for a boolean": (
        put("Evaluate", "history", value=evaluation(is_validation="no")), "is_validation: expected"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """A run with a teacher that clusters, stopped after two epochs."""
    CLUSTERS.extend([3, 3, 3])
    MISHAPS["epoch2"] = send(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(config(folder, "stopped", *TAUGHT))
    return folder / "stopped"


TAUGHT = ("CLUSTERER", "GivenClusters", "CRITERION", "[Triplet]", "HOOKS", "[Mishap, MeanTeacher]")


@pytest.mark.parametrize("what", FORGED)
def test_what_a_checkpoint_holds_for_hooks_is_checked(
    folder: Path, stopped: Path, what: str
) -> None:
    forge, message = FORGED[what]
    target = folder / f"forged_{list(FORGED).index(what)}"
    shutil.copytree(stopped, target)
    state = torch.load(target / "checkpoint_0002.pth", weights_only=True)
    forge(state)
    torch.save(state, target / "checkpoint_0002.pth")
    with pytest.raises(WeightsError, match=message):
        train(config(folder, target.name, *TAUGHT), resume=True)
