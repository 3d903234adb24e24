"""Every config in the repository loads and builds; the commands of the README work."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from reid.assembly.criterion import build_criterion
from reid.assembly.data import build_dataset
from reid.assembly.hooks import build_evaluator
from reid.assembly.network import build_model
from reid.assembly.plugins import register_parts
from reid.config import Config, config_differences, load_config
from reid.data.maps import map_size
from reid.registry import CLUSTERER, MAP, SAMPLER, ConfigError
from reid.registry import build as build_part
from reid.structures import Batch, DataError
from reid.workflows.comparison import load_paper
from reid.workflows.reproduce import Run, plan_runs
from reid.workflows.train import train

ROOT = Path(__file__).parents[1]
COMPARISON = ROOT / "configs" / "comparison" / "tables.yaml"
ADAPTATION = ROOT / "configs" / "adaptation" / "tables.yaml"
CONFIGS = sorted(
    path
    for pattern in ("configs/**/*.yaml", "projects/*/configs/*.yaml")
    for path in ROOT.glob(pattern)
    if path not in (COMPARISON, ADAPTATION)
)


@cache
def loaded(path: Path) -> Config:
    return load_config(path)


WITHOUT_AUTOCAST = ("ABDHead", "PFDHead")  # which `meta` does not have
NETWORKS: dict[str, tuple[int, int]] = {}


def network_sizes(config: Config) -> tuple[int, int]:
    """Length of an embedding and number of parts; a network of several configs is built once."""
    key = repr([asdict(config.model), config.input.size, config.input.maps])
    if key not in NETWORKS:
        size = (config.input.size[0], config.input.size[1])
        maps = [build_part(MAP, spec, "input.maps") for spec in config.input.maps]
        # On `meta` there are shapes without numbers; to draw those of large networks takes long.
        numbers = config.model.backbone_weights or config.model.head["name"] in WITHOUT_AUTOCAST
        with torch.device("cpu" if numbers else "meta"), torch.no_grad():
            model = build_model(config, size, num_cameras=6)
            side = {m.side: torch.zeros(1, len(m.mirror), *map_size(size, m.stride)) for m in maps}
            found = model.eval()(Batch.of(torch.zeros(1, 3, *size))._replace(side=side))
        assert found.unit.shape == (1, 1 + model.num_parts, model.embed_dim)
        assert found.test.ndim == 2
        NETWORKS[key] = model.embed_dim, model.num_parts
    return NETWORKS[key]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_builds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = copy.deepcopy(loaded(path))
    register_parts(config)
    weights = config.model.backbone_weights
    if weights.startswith("projects/"):
        assert (ROOT / weights).is_file(), "weights that the repository brings"
    else:
        config.model.backbone_weights = ""
    if config.model.backbone.pop("pretrained", False):  # the test needs no network
        assert not weights
    embed_dim, num_parts = network_sizes(config)
    build_evaluator(config)
    if config.clusterer is not None:
        build_part(CLUSTERER, config.clusterer, "clusterer")
    if not config.datasets.train:  # a base for other configs, not a run
        return
    dataset = dict(config.datasets.train)
    if dataset["name"] in ("DukeMTMCreID", "OccludedDuke"):
        with pytest.raises(ConfigError, match="withdrawn"):
            build_dataset(dataset, "datasets.train")
        dataset["accept_withdrawn"] = True
    build_dataset(dataset, "datasets.train")
    sources = config.datasets.source_domains
    build_part(
        SAMPLER, config.dataloader.sampler, "dataloader.sampler", seed=1, source_domains=sources
    )
    for number in range(len(config.stages) or 1):
        build_criterion(
            config.of_stage(number).criterion,
            embed_dim=embed_dim,
            num_parts=num_parts,
            num_classes=10,
            source_domains=sources,
        )


def test_every_run_has_a_different_folder() -> None:
    runs = [config for config in map(loaded, CONFIGS) if config.datasets.train]
    assert len({config.output_dir for config in runs}) == len(runs) > 10


def published(name: str) -> list[float]:
    config = load_config(ROOT / "projects" / "TMGF" / "configs" / f"{name}.yaml")
    loss, sampler, solver = config.criterion[0], config.dataloader.sampler, config.solver
    assert config.input.size == (384, 128)
    assert config.clusterer is not None
    assert (solver.optimizer, solver.amp, solver.schedule) == ("SGD", "fp16", "multistep")
    return [
        solver.base_lr, solver.momentum, solver.weight_decay, solver.max_epochs,
        *solver.milestones, solver.gamma, solver.warmup_epochs, solver.warmup_factor,
        sampler["batch_size"], sampler["images_per_proxy"], sampler["steps_per_epoch"],
        config.clusterer["k1"], config.clusterer["k2"], config.clusterer["eps"],
        config.clusterer["min_samples"], loss["temperature"], loss["momentum"], loss["balance"],
        loss["part_weight"], loss["num_positives"], loss["num_negatives"],
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "positives"), [("market", 3), ("duke", 2), ("msmt", 3)])
def test_published_hyper_parameters(name: str, positives: int) -> None:
    assert published(name) == [3.5e-4, 0.9, 5e-4, 50, 20, 40, 0.1, 10, 0.01, 32, 4, 200, 20, 6, 0.5,
                               4, 0.07, 0.2, 0.15, 0.1, positives, 50]  # fmt: skip


def train_net(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train_net.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "train_net.py"), run_name="__main__")
    return int(stop.value.code or 0)


def test_msmt_stops_only_for_the_missing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    file = str(ROOT / "projects" / "TMGF" / "configs" / "msmt.yaml")
    assert train_net(monkeypatch, "--config-file", file, "OUTPUT_DIR", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("DataError: MSMT17: there is no folder")
    assert str(tmp_path / "MSMT17_V1") in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["duke", "duke_gt"])
def test_withdrawn_data_takes_the_word_that_the_readme_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    readme = (ROOT / "projects" / "TMGF" / "README.md").read_text("utf-8")
    (word,) = re.findall(r"configs/duke\.yaml (\S+ \S+)\n", readme)
    file = ROOT / "projects" / "TMGF" / "configs" / f"{name}.yaml"
    command = ["--config-file", str(file), "OUTPUT_DIR", str(tmp_path / "out")]
    assert train_net(monkeypatch, *command) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: datasets.train (DukeMTMCreID): DukeMTMC-reID shows")
    assert word in error
    assert train_net(monkeypatch, *command, *word.split()) == 2
    assert capsys.readouterr().err.startswith("DataError: DukeMTMC-reID: there is no folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "gone.yaml"], "ConfigError: config file 'gone.yaml' does not exist"),
        (["--config-file", "FILE", "SOLVER.BASE_LRR", "1"], "did you mean 'solver.base_lr'"),
        (["--config-file", "FILE", "SOLVER.BASE_LR"], "'SOLVER.BASE_LR' has no value"),
        (["--config-file", "FILE", "--eval-only"], "model.weights: expected a checkpoint"),
        (["--config-file", "FILE", "--eval-only", "MODEL.WEIGHTS", "gone.pth"], "gone.pth: there"),
    ],
)
def test_errors_are_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    small = (
        "{NAME: SyntheticPersons, NUM_TRAIN: 1, NUM_TEST: 1, NUM_CAMERAS: 2, HEIGHT: 32, WIDTH: 16}"
    )
    (tmp_path / "FILE").write_text(f"DATASETS: {{TRAIN: {small}}}\nMODEL: {{BACKBONE: {{NAME: "
                                   "TimmBackbone, MODEL: test_resnet}}\n")  # fmt: skip
    assert train_net(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_shows_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_net(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for word in ("--config-file", "--resume", "--eval-only", "--overwrite", "KEY VALUE"):
        assert word in text


def test_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    (tmp_path / "MSMT17_V1").mkdir()
    config = load_config(
        ROOT / "projects" / "TMGF" / "configs" / "msmt.yaml", ["OUTPUT_DIR", str(tmp_path / "out")]
    )
    with pytest.raises(DataError, match=r"MSMT17_V1: there is no train/, mask_train_v2/"):
        train(config)


def planned(tables: Path, folder: Path, rows: int) -> list[Run]:
    paper = load_paper(tables)
    runs, notes = plan_runs(paper, [*paper.table(1).rows], "synthetic", folder, seeds=3)
    assert (len(runs), notes) == (rows * 3, {})
    return runs


def test_compared_methods_differ_in_what_is_theirs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    runs = planned(COMPARISON, tmp_path, rows=4)
    reference = next(run for run in runs if run.row == "tmgf").config
    own = ("plugins", "output_dir", "seed", "model.head", "criterion", "dataloader.sampler")
    own += ("solver.optimizer", "solver.base_lr", "solver.weight_decay")
    for run in runs:
        for key in config_differences(reference, run.config):
            assert key.startswith(own), (run.row, key)


def test_adaptation_is_compared_on_the_same_two_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    configs = {run.row: run.config for run in planned(ADAPTATION, tmp_path, rows=7)}
    assert configs.pop("supervised").datasets.source is None
    reference = configs["source"].datasets
    for row, config in configs.items():
        assert config.datasets.source == reference.source is not None, row
        assert config.datasets.train == reference.train, row
