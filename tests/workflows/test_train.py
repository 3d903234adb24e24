"""Whole runs on a set of drawn persons."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from reid.config import Config, load_config
from reid.engine.trainer import Trainer
from reid.modeling.weights import WeightsError, load_checkpoint, read_checkpoint
from reid.registry import HOOK, ConfigError, Hook
from reid.structures import DataError
from reid.workflows.evaluate import evaluate as run_test
from reid.workflows.train import train

PERSONS = ("{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 5, NUM_CAMERAS: 3, "
           "NUM_DISTRACTORS: 4, HEIGHT: 32, WIDTH: 16}")  # fmt: skip
SUPERVISED = f"""
DATASETS: {{TRAIN: {PERSONS}}}
INPUT: {{SIZE: [64, 32], TRANSFORMS: [RandomFlip, {{NAME: PadCrop, PAD: 2}}, RandomErasing]}}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {{NAME: PKSampler, BATCH_SIZE: 16, STEPS_PER_EPOCH: 3}}
MODEL: {{BACKBONE: {{NAME: TimmBackbone, MODEL: test_resnet}}}}
CRITERION: [{{NAME: CrossEntropy, SMOOTHING: 0.1}}, {{NAME: Triplet, WEIGHT: 0.5}}]
SOLVER: {{OPTIMIZER: Adam, MAX_EPOCHS: 3, WARMUP_EPOCHS: 1, MILESTONES: [2]}}
TEST: {{EVAL_PERIOD: 1, EVAL_AT_START: true, RANKED_LISTS: 3}}
DEVICE: cpu
LOG_PERIOD: 2
"""
UNSUPERVISED = """
_BASE_: supervised.yaml
CRITERION: [Triplet]
CLUSTERER: {NAME: JaccardDBSCAN, K1: 6, K2: 2, EPS: 0.8, MIN_SAMPLES: 2}
"""


@HOOK.register()
class StopAfterEpoch(Hook):
    """Plays the power cut."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def before_epoch(self, trainer: Trainer) -> None:
        if trainer.epoch == self._epoch:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("runs")
    (root / "supervised.yaml").write_text(SUPERVISED)
    (root / "unsupervised.yaml").write_text(UNSUPERVISED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATASETS", str(root / "datasets"))
        yield root


def config(folder: Path, name: str, output: str, *pairs: Any) -> Config:
    overrides = ["OUTPUT_DIR", str(folder / output), *map(str, pairs)]
    return load_config(folder / f"{name}.yaml", overrides)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)[0]


def numbers_of(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.json without times.

    Identities are counted once a run, so a resumed supervised run counts them again.
    """
    clocks = ("data_time", "step_time", "memory_mb", "extraction_time", "label_time")
    found = [{k: v for k, v in line.items() if k not in clocks} for line in lines(path)]
    return [line for line in found if line["kind"] != "labels" or line["purity"] < 1]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr.isatty", lambda: False, raising=False)
        train(config(folder, "supervised", "finished"))
    return folder / "finished"


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    names = {entry.name.split(".")[0] for entry in finished.iterdir()}
    assert names == {
        "checkpoint_0002", "checkpoint_0003", "config", "events", "log", "metrics", "model_best",
        "model_final", "ranked_lists", "report", "results", "similarities",
    }  # fmt: skip
    kinds = [line["kind"] for line in lines(finished / "metrics.json")]
    assert kinds == ["test", "labels", "train", "train", "test", "train", "train", "test",
                     "train", "train", "test"]  # fmt: skip
    results = json.loads((finished / "results.json").read_text())
    assert [entry["epoch"] for entry in results["history"]] == [0, 1, 2, 3]
    assert results["final"][0]["epoch"] == 3
    best = max(results["history"][1:], key=lambda entry: entry["numbers"]["mAP"])
    assert results["best"][0]["numbers"]["mAP"] == best["numbers"]["mAP"]
    with Image.open(finished / "ranked_lists.png") as picture:
        assert picture.width > 400


def test_only_the_last_evaluation_carries_details(finished: Path, folder: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    (final,) = results["final"]
    assert len(final["per_query_AP"]) > 10
    precision = [value for value in final["per_query_AP"] if value is not None]
    assert final["numbers"]["mAP"] == pytest.approx(sum(precision) / len(precision))
    worst = [final["per_query_AP"][row] for row in final["hardest_queries"]]
    assert worst == sorted(precision)[:10]
    assert len(final["hardest_query_paths"]) == len(worst)
    assert all(Path(path).is_file() for path in final["hardest_query_paths"])
    pairs = final["camera_pairs"]
    assert pairs["query_cameras"] == [0, 1, 2]
    for row, camid in zip(pairs["mAP"], pairs["query_cameras"], strict=True):
        for value, other in zip(row, pairs["gallery_cameras"], strict=True):
            assert (value is None) == (camid == other)
    for entry in (*results["best"], *results["history"]):
        assert entry.keys() == {"test_set", "epoch", "numbers"}
    assert results["best_chosen_on_test_set"]


def test_details_of_several_test_sets_and_of_a_reranking_evaluator(folder: Path) -> None:
    other = PERSONS.replace("NUM_TEST: 5", "NUM_TEST: 7")
    evaluator = "{NAME: Market1501Evaluator, RERANKING: true, K1: 4, K2: 2}"
    pairs = ("DATASETS.TEST", f"[{PERSONS}, {other}]", "SOLVER.MAX_EPOCHS", 1,
             "TEST.EVAL_AT_START", "false", "TEST.EVALUATOR", evaluator)  # fmt: skip
    train(config(folder, "supervised", "several", *pairs))
    final = json.loads((folder / "several" / "results.json").read_text())["final"]
    assert len(final) == 2  # two test sets of the same name
    assert len(final[0]["per_query_AP"]) < len(final[1]["per_query_AP"])
    for entry in final:  # details and numbers come from the same ranking, which is named
        precision = [value for value in entry["per_query_AP"] if value is not None]
        assert entry["numbers"]["mAP"] == pytest.approx(sum(precision) / len(precision))
        assert "re-ranking" in entry["ranked_by"]


def test_the_log_tells_everything(finished: Path) -> None:
    log = (finished / "log.txt").read_text()
    for text in ("Environment", "torch", "CUDA" if torch.cuda.is_available() else "cpu",
                 "Config", "MAX_EPOCHS: 3", "Data\n", "iter 2/3", "eta 0:00:", "loss ", "lr ",
                 "data ", "step ", "mem ", "clusters", "purity", "before training",
                 "after epoch 3", "Rank-20", "model_best.safetensors"):  # fmt: skip
        assert text in log, text


def test_config_is_written_resolved(finished: Path, folder: Path) -> None:
    assert load_config(finished / "config.yaml") == config(folder, "supervised", "finished")
    assert yaml.safe_load((finished / "config.yaml").read_text())["SOLVER"]["GAMMA"] == 0.1


def test_a_finished_run_is_not_overwritten_by_mistake(finished: Path, folder: Path) -> None:
    before = (finished / "metrics.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already; --resume goes on"):
        train(config(folder, "supervised", "finished"))
    wrong = config(folder, "supervised", "finished", "CRITERION.1.MARGIN", -1)
    with pytest.raises(ConfigError, match="margin: expected a number from 0"):
        train(wrong, overwrite=True)
    assert (finished / "metrics.json").read_bytes() == before
    assert "stopped by ConfigError" in (finished / "log.txt").read_text()


def test_groups_of_batchnorm_divide_the_batch(folder: Path) -> None:
    wrong = config(folder, "supervised", "groups", "MODEL.BN_SAMPLES_PER_GROUP", 6)
    with pytest.raises(ConfigError, match="expected 0 or a divisor of the batch of 16 samples"):
        train(wrong)


def test_eval_only_gives_the_numbers_of_the_run(finished: Path, folder: Path) -> None:
    found = run_test(
        config(folder, "supervised", "eval", "MODEL.WEIGHTS", finished / "model_final.safetensors")
    )
    results = json.loads((finished / "results.json").read_text())
    assert found["SyntheticPersons"] == pytest.approx(results["final"][0]["numbers"])
    written = json.loads((folder / "eval" / "results_eval_only.json").read_text())
    (final,) = results["final"]
    details = written["SyntheticPersons"]
    assert details.keys() == final.keys() - {"test_set", "is_validation", "epoch"}
    assert written["provenance"].keys() == results["provenance"].keys()
    assert details["numbers"] == found["SyntheticPersons"]
    assert details["hardest_query_paths"] == final["hardest_query_paths"]
    assert details["per_query_AP"] == pytest.approx(final["per_query_AP"])
    with pytest.raises(ConfigError, match=r"model\.weights: expected a checkpoint"):
        run_test(config(folder, "supervised", "eval"))


@pytest.mark.parametrize("name", ["supervised", "unsupervised"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_stopped_run_resumes_bit_for_bit(folder: Path, name: str, epoch: int) -> None:
    whole, cut = folder / f"whole_{name}", folder / f"cut_{name}_{epoch}"
    harmless = ("HOOKS", "[{NAME: StopAfterEpoch, EPOCH: 99}]")
    if not whole.exists():
        train(config(folder, name, whole.name, *harmless))
    with pytest.raises(KeyboardInterrupt):
        train(
            config(folder, name, cut.name, "HOOKS", f"[{{NAME: StopAfterEpoch, EPOCH: {epoch}}}]")
        )
    torch.rand(3)
    train(config(folder, name, cut.name, *harmless), resume=True, allow_config_change=True)
    for file in ("model_final.safetensors", "model_best.safetensors"):
        expected, found = weights(whole / file), weights(cut / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert numbers_of(cut / "metrics.json") == numbers_of(whole / "metrics.json")
    results = [json.loads((run / "results.json").read_text()) for run in (cut, whole)]
    assert results[0].pop("provenance").keys() == results[1].pop("provenance").keys()
    assert results[0] == results[1]


def test_resume_without_a_checkpoint_starts_anew(folder: Path) -> None:
    train(config(folder, "supervised", "anew", "SOLVER.MAX_EPOCHS", 1), resume=True)
    assert "training starts over" in (folder / "anew" / "log.txt").read_text()


def test_a_truncated_checkpoint_is_refused(finished: Path, folder: Path) -> None:
    target = folder / "truncated"
    target.mkdir()
    whole = (finished / "checkpoint_0003.pth").read_bytes()
    (target / "checkpoint_0003.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"truncated/checkpoint_0003\.pth: is broken or cut off"):
        train(config(folder, "supervised", "truncated"), resume=True)


def test_a_checkpoint_of_another_config_is_refused(finished: Path, folder: Path) -> None:
    target = folder / "other"
    target.mkdir()
    (target / "checkpoint_0003.pth").write_bytes((finished / "checkpoint_0003.pth").read_bytes())
    other = ("MODEL.BACKBONE.MODEL", "test_vit")
    with pytest.raises(WeightsError, match="does not fit this config"):
        train(config(folder, "supervised", "other", *other), resume=True)


def test_what_a_checkpoint_holds(finished: Path) -> None:
    state = load_checkpoint(finished / "checkpoint_0003.pth")
    assert state["epoch"] == 3
    assert {"model", "criterion", "optimizer", "scaler", "random"} <= state.keys()
    assert {"python", "numpy", "torch"} <= state["random"][0].keys()


def test_no_cluster_names_the_epoch_and_what_to_change(folder: Path) -> None:
    pairs = ("CLUSTERER.EPS", 0.001, "CLUSTERER.MIN_SAMPLES", 40)
    with pytest.raises(ValueError, match=r"epoch 1: no cluster: .*min|epoch 1: no cluster") as info:
        train(config(folder, "unsupervised", "nothing", *pairs))
    for text in ("40", "0.001", "raise clusterer.eps", "clusterer.min_samples"):
        assert text in str(info.value)


def test_unlabelled_images_need_a_clusterer(folder: Path) -> None:
    path = folder / "datasets" / "own"
    path.mkdir()
    Image.new("RGB", (8, 16)).save(path / "1.png")
    (path / "list.csv").write_text("path\n1.png\n")
    pairs = ("DATASETS.TRAIN", "{NAME: CSV, PATH: own/list.csv}")
    with pytest.raises(ConfigError, match="no training image of own has one; set a clusterer"):
        train(config(folder, "supervised", "own", *pairs))


def test_missing_data_stops_at_once(folder: Path) -> None:
    with pytest.raises(DataError, match="MSMT17"):
        train(config(folder, "supervised", "missing", "DATASETS.TRAIN", "MSMT17"))


@pytest.mark.parametrize("amp", ["bf16"])
def test_mixed_precision_clipping_and_accumulation(folder: Path, amp: str) -> None:
    pairs = ("SOLVER.AMP", amp, "SOLVER.CLIP_GRAD_NORM", 1.0, "SOLVER.ACCUMULATION_STEPS", 2,
             "SOLVER.MAX_EPOCHS", 1, "SOLVER.SCHEDULE", "cosine")  # fmt: skip
    train(config(folder, "supervised", f"amp_{amp}", *pairs))
    assert all(bool(torch.isfinite(w).all()) for w in
               weights(folder / f"amp_{amp}" / "model_final.safetensors").values())  # fmt: skip


@pytest.mark.page
def test_resume_of_a_finished_run_says_so_with_and_without_a_test_set(
    finished: Path, folder: Path
) -> None:
    (folder / "list").mkdir()
    for number in range(16):
        Image.new("RGB", (16, 32), (16 * number, 90, 40)).save(folder / "list" / f"{number}.png")
    rows = "".join(f"{number}.png,{number // 4},{number % 2},train\n" for number in range(16))
    (folder / "list" / "list.csv").write_text(f"path,pid,camid,split\n{rows}")
    alone = ("DATASETS.TRAIN", f"{{NAME: CSV, PATH: {folder / 'list' / 'list.csv'}}}")
    train(config(folder, "supervised", "alone", *alone, "SOLVER.MAX_EPOCHS", 2))
    assert not (folder / "alone" / "results.json").exists()
    for name, epochs, pairs in (("finished", 3, ()), ("alone", 2, alone)):
        log = folder / name / "log.txt"
        before, length = weights(folder / name / "model_final.safetensors"), len(log.read_text())
        for asked in (epochs, 1):
            settings = config(folder, "supervised", name, *pairs, "SOLVER.MAX_EPOCHS", asked)
            train(settings, resume=True, allow_config_change=True)
        added = log.read_text()[length:]
        line = f"all {epochs} epochs are done: nothing to train; SOLVER.MAX_EPOCHS above {epochs}"
        assert added.count(line) == 2
        assert "Model backbone" not in added  # nothing was built
        assert load_config(folder / name / "config.yaml").solver.max_epochs == epochs
        after = weights(folder / name / "model_final.safetensors")
        assert all(torch.equal(after[key], value) for key, value in before.items())
    # a run that was killed in its last file writes it
    (folder / "alone" / "report.html").unlink()
    (folder / "alone" / ".report.html.ktaa7ep0.part").touch()
    train(config(folder, "supervised", "alone", *alone, "SOLVER.MAX_EPOCHS", 2), resume=True)
    assert (folder / "alone" / "report.html").is_file()
    assert not list((folder / "alone").glob(".*.part"))
    # what an earlier, shorter run wrote last does not count as written
    checkpoint = folder / "alone" / "checkpoint_0002.pth"
    os.utime(checkpoint, ns=(checkpoint.stat().st_atime_ns, checkpoint.stat().st_mtime_ns + 10**12))
    before = (folder / "alone" / "report.html").stat().st_mtime_ns
    train(config(folder, "supervised", "alone", *alone, "SOLVER.MAX_EPOCHS", 2), resume=True)
    assert (folder / "alone" / "report.html").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    "setting",
    [
        ("SOLVER.BASE_LR", "1e-320"),
        ("DATALOADER.SAMPLER", "{NAME: PKSampler, BATCH_SIZE: 8, STEPS_PER_EPOCH: 1000000000000}"),
        ("DATASETS.TRAIN", "{NAME: SyntheticPersons, HEIGHT: 1000000000}"),
        ("CRITERION", "[{NAME: ClusterContrastLoss, TEMPERATURE: 1e-320}]"),
        ("CRITERION", "[{NAME: ClusterContrastLoss, TEMPERATURE: 1e300}]"),
        ("MODEL.BACKBONE", "{NAME: ViT, DEPTH: 1000000}"),
    ],
)
def test_numbers_of_parts_have_bounds_on_both_sides(
    tmp_path: Path, setting: tuple[str, str]
) -> None:
    pairs = ("PLUGINS", "[clustercontrast]", "DATASETS.TRAIN", "SyntheticPersons",
             "MODEL.BACKBONE", "{NAME: TimmBackbone, MODEL: test_resnet}",
             "DATALOADER.SAMPLER", "{NAME: PKSampler, BATCH_SIZE: 8}", *setting)  # fmt: skip
    with pytest.raises(ConfigError, match=r"expected (a number from|0 to 1,000,000,000)"):
        train(load_config(overrides=["OUTPUT_DIR", str(tmp_path / "run"), *pairs]))
