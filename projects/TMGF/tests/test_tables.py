"""The rows of the paper's tables: published numbers, configs, and one small table."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid.__main__ import main as reid_command
from reid.assembly.plugins import register_parts
from reid.assembly.specs import check_specs
from reid.assembly.trainer import build_trainer
from reid.config import Config, load_config
from reid.engine.metrics import MetricWriter
from reid.engine.stopping import StopSignals
from reid.modeling.model import ReIDModel
from reid.registry import BACKBONE, HEAD, build
from reid.structures import Batch
from reid.workflows.comparison import load_paper
from reid.workflows.reproduce import plan_runs

ROOT = Path(__file__).parents[3]
PAPER = load_paper(ROOT / "projects" / "TMGF" / "tables.yaml")
DATASETS = ["market", "duke", "msmt", "synthetic"]
COMPARED = {  # rows of other projects, and their config files in order
    "cluster_contrast": ["ClusterContrast/configs/{}", "ClusterContrast/configs/variants/infomap"],
    "cap": ["CAP/configs/{}"],
    "iics": ["IICS/configs/{}"],
    "o2cap": ["O2CAP/configs/{}"],
    "mgh": ["MGH/configs/{}"],
    "rlcc": ["RLCC/configs/{}"],
    "pplr": ["PPLR/configs/{}"],
    "ice": ["ICE/configs/{}"],
    "multi_centroid": ["MultiCentroid/configs/{}"],
    "transreid_ssl": ["TransReID_SSL/configs/usl_{}_stem"],
    "transreid_ssl_gt": ["TransReID_SSL/configs/supervised_{}"],
    "transreid": ["TransReID/configs/{}"],
    "la_transformer": ["LATransformer/configs/{}"],
    "st_reid": ["STReID/configs/{}"],
    "pat_ours": ["PAT/configs/{}"],
    "abd_net": ["ABDNet/configs/{}"],
    "pfd": ["PFD/configs/{}"],
}
SUPERVISED = {
    "transreid_ssl_gt", "transreid", "la_transformer", "st_reid", "pat_ours", "abd_net", "pfd",
}  # fmt: skip
CONVOLUTIONAL = {"abd_net"}  # rows whose network on drawn persons is a ResNet
ROWS = {  # parts of each branch, copies of layer L, class tokens in the global feature
    "tmgf": ([2, 3], 2, [0, 1]),
    "tmgf1": ([], 1, [0]),
    "tmgf2": ([2], 1, [0]),
    "tmgf3": ([3], 1, [0]),
    "tmgf4": ([2, 3], 1, [0]),
    "tmgf5": ([2, 3], 2, [0]),
    "tmgf6": ([2, 3], 2, [1]),
    "parts_2_4": ([2, 4], 2, [0, 1]),
    "parts_3_4": ([3, 4], 2, [0, 1]),
    "tmgf_gt": ([2, 3], 2, [0, 1]),
}


def config(row: str, dataset: str) -> Config:
    runs, notes = plan_runs(PAPER, [row], dataset, Path("nowhere"), 1)
    assert not notes
    (run,) = runs
    return run.config


def test_what_the_paper_says() -> None:
    assert PAPER.published("tmgf", "msmt", "mAP") == 58.2
    assert PAPER.published("tmgf_gt", "market", "Rank-10") == 99.3
    assert PAPER.published("pplr", "duke", "mAP") is None
    assert PAPER.published("tmgf1", "synthetic", "mAP") == 53.5  # MSMT17's, beside drawn persons
    best = {name: max(PAPER.table(name).rows, key=lambda row: PAPER.published(row, "msmt", "mAP"))
            for name in (2, 3, 4)}  # fmt: skip
    assert best == {2: "tmgf", 3: "tmgf", 4: "tmgf"}
    assert set(ROWS) == {name for name, method in PAPER.methods.items()
                         if method.configs and name.startswith(("tmgf", "parts"))}  # fmt: skip
    shown = {row for table in PAPER.tables.values() for row in table.rows}
    assert shown == set(PAPER.methods)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_row_changes_its_own_settings_alone(dataset: str) -> None:
    full = config("tmgf", dataset)
    for row in ROWS:
        other = config(row, dataset)
        assert (other.clusterer is None) == (row == "tmgf_gt")
        assert other.model.head["name"] == "TMGFHead"
        other.model.head, other.clusterer = full.model.head, full.clusterer
        other.output_dir = full.output_dir
        assert other == full, row


@pytest.mark.parametrize("dataset", DATASETS)
def test_compared_methods_are_those_of_their_projects(dataset: str) -> None:
    """They have the settings that the projects' tests check; without a config there is a note."""
    without_duke = {"transreid_ssl", "transreid_ssl_gt", "la_transformer"}
    missing = without_duke if dataset == "duke" else set()
    runs, notes = plan_runs(PAPER, [*COMPARED], dataset, Path("nowhere"), 1)
    assert notes == dict.fromkeys(missing, "no config for duke")
    assert {run.row for run in runs} == COMPARED.keys() - missing
    for run in runs:
        files = [ROOT / "projects" / f"{name.format(dataset)}.yaml" for name in COMPARED[run.row]]
        expected = load_config(files, ["OUTPUT_DIR", run.config.output_dir])
        assert run.config == expected
        unlabelled = expected.clusterer is not None or expected.labeller is not None
        assert unlabelled == (run.row not in SUPERVISED)
    infomap = next(run for run in runs if run.row == "cluster_contrast").config.clusterer
    assert infomap == {"name": "Infomap", "k1": 15, "min_similarity": 0.5, "min_cluster_size": 5}


TRAINED = [row for row in PAPER.table(5).rows if PAPER.methods[row].configs]


def test_each_row_of_table_5_is_trained_or_says_why_not() -> None:
    for row in PAPER.table(5).rows.keys() - {*TRAINED}:
        assert PAPER.methods[row].note, row
    runs, _ = plan_runs(PAPER, [*PAPER.table(5).rows], "synthetic", Path("nowhere"), 3)
    assert [run.row for run in runs] == TRAINED * 3, "each has a config for drawn persons"
    assert [run.config.seed for run in runs] == [
        seed for seed in (1, 2, 3) for _ in range(len(TRAINED))
    ]


@pytest.fixture(scope="module")
def persons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("persons")


@pytest.mark.parametrize("row", TRAINED)
def test_a_row_of_table_5_builds_on_drawn_persons(
    row: str, persons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("REID_DATASETS", str(persons))
    few = {"num_train": 8, "num_test": 4, "num_cameras": 3, "height": 96, "width": 48}
    chosen = config(row, "synthetic")
    chosen.output_dir = str(tmp_path)
    for role in ("train", "source"):
        if spec := getattr(chosen.datasets, role):
            assert spec["name"] == "SyntheticPersons"
            setattr(chosen.datasets, role, spec | few)
    register_parts(chosen)
    check_specs(chosen, training=True)
    trainer = build_trainer(chosen, torch.device("cpu"), MetricWriter(tmp_path), StopSignals())
    assert trainer.max_epochs == chosen.solver.max_epochs


def test_methods_that_could_not_be_reconstructed_say_so() -> None:
    runs, notes = plan_runs(PAPER, ["isobe", "darc"], "market", Path("nowhere"), 1)
    assert not runs
    assert "no code was found" in notes["isobe"]
    assert "neither code nor text" in notes["darc"]
    assert all(note.startswith("published numbers only: ") for note in notes.values())


def test_compared_methods_have_the_data_of_the_tables_on_drawn_persons() -> None:
    full = config("tmgf", "synthetic")
    for row in COMPARED:
        other = config(row, "synthetic")
        assert other.datasets == full.datasets
        assert replace(other.input, views=[], maps=[]) == full.input
        assert replace(other.test, evaluator=full.test.evaluator) == full.test
        weights = full.model.backbone_weights
        if row in CONVOLUTIONAL:  # trained on the same persons
            weights = weights.replace("demo_backbone", "demo_resnet")
        assert other.model.backbone_weights == weights
        assert other.dataloader.sampler["batch_size"] == full.dataloader.sampler["batch_size"]
        if other.clusterer is not None:
            assert other.solver.max_epochs == full.solver.max_epochs
            assert other.dataloader.sampler["steps_per_epoch"] == 30


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_row_of_two_domains(dataset: str) -> None:
    found = config("spcl", dataset)
    file = ROOT / "projects" / "SpCL" / "configs" / f"uda_to_{dataset}.yaml"
    assert found == load_config(file, ["OUTPUT_DIR", found.output_dir])
    assert found.datasets.source is not None
    assert found.datasets.train == config("tmgf", dataset).datasets.train


def test_a_row_works_by_hand() -> None:
    configs = ROOT / "projects" / "TMGF" / "configs"
    files = [configs / "msmt.yaml", configs / "variants" / "tmgf2.yaml"]
    found = load_config(files, ["OUTPUT_DIR", "by hand"])
    planned = config("tmgf2", "msmt")
    planned.output_dir = found.output_dir
    assert found == planned
    shortcut = load_config(configs / "msmt_gt.yaml", ["OUTPUT_DIR", "by hand"])
    assert shortcut == load_config(
        [configs / "msmt.yaml", configs / "variants" / "gt.yaml"], ["OUTPUT_DIR", "by hand"]
    )


@pytest.mark.parametrize("row", ROWS)
def test_wiring(row: str) -> None:
    """At the paper's 24 x 8 tokens: each feature's branch, and the rows it is pooled from."""
    parts, copies, used = ROWS[row]
    chosen = config(row, "msmt")
    register_parts(chosen)
    assert chosen.input.size == (384, 128)
    assert all(24 % count == 0 for count in parts), "every stripe has as many rows"
    small = {"EMBED_DIM": 12, "DEPTH": 2, "NUM_HEADS": 2, "STEM_CHANNELS": 4, "DROP_PATH": 0.0}
    spec = chosen.model.backbone | {name.lower(): value for name, value in small.items()}
    torch.manual_seed(0)
    backbone = build(BACKBONE, spec, "backbone", image_size=(384, 128), num_cameras=2)
    head = build(HEAD, chosen.model.head, "head", backbone=backbone)
    model = ReIDModel(backbone, head).eval()
    outputs: list[Tensor] = []
    for branch in head.branches:
        branch.register_forward_hook(lambda _, __, output: outputs.append(output))
    found = model(Batch.of(torch.randn(1, 3, 384, 128), torch.zeros(1, dtype=torch.int64)))
    assert len(outputs) == copies
    assert found.unit[:, 1:].shape == (1, sum(parts), 12)

    def reached(feature: Tensor) -> list[list[int]]:
        """Tokens of each branch's output that a feature depends on."""
        weights = torch.linspace(1, 2, 12)  # the sum of squares of a unit vector has no gradient
        grads = torch.autograd.grad((feature * weights).sum(), outputs, retain_graph=True,
                                    materialize_grads=True)  # fmt: skip
        return [grad[0].abs().sum(1).nonzero()[:, 0].tolist() for grad in grads]

    assert reached(found.test) == [[0] if i in used else [] for i in range(copies)]
    stripes = [(i, k, count) for i, count in enumerate(parts) for k in range(count)]
    for number, (branch, k, count) in enumerate(stripes):
        high = 24 // count
        tokens = list(range(1 + 8 * high * k, 1 + 8 * high * (k + 1)))
        expected: list[list[int]] = [[] for _ in range(copies)]
        expected[branch % copies] = tokens
        assert reached(found.unit[:, 1:][:, number]) == expected


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    persons = (
        "{NAME: SyntheticPersons, NUM_TRAIN: 8, NUM_TEST: 4, NUM_CAMERAS: 3, HEIGHT: 96, WIDTH: 48}"
    )
    arguments = ["--table", "2", "--dataset", "synthetic", "--rows", "tmgf,tmgf1", "--output-dir",
                 str(tmp_path / "out"), "DATASETS.TRAIN", persons, "SOLVER.MAX_EPOCHS", "1",
                 "DATALOADER.SAMPLER.STEPS_PER_EPOCH", "1", "CLUSTERER.K1", "6"]  # fmt: skip

    def tool(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments, *more])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path("tools/reproduce.py", run_name="__main__")
        return int(stop.value.code or 0)

    assert tool() == 0
    text = capsys.readouterr().out
    assert "Table 2 of TMGF (WACV workshops 2023) on SyntheticPersons" in text
    content: dict[str, Any] = json.loads((tmp_path / "out/synthetic/table_2.json").read_text())
    assert [row["row"] for row in content["rows"]] == ["tmgf1", "tmgf"]  # as the paper has them
    assert [row["finished_seeds"] for row in content["rows"]] == [[1], [1]]
    assert content["published_on"] == "MSMT17"
    assert content["order"]["mAP"]["pairs"] == 1
    assert tool() == 0
    assert capsys.readouterr().out.count("finished already") == 2
    assert tool("SOLVER.BASE_LR", "0.1") == 2
    assert "solver.base_lr 0.0035 there, 0.1 now" in capsys.readouterr().err
    other = str(tmp_path / "other")
    more = ["--table", "5", "--rows", "tmgf", "--output-dir", other, "CLUSTERER.K1", "none"]
    assert tool(*more) == 1
    text = capsys.readouterr().out
    assert "seed 1 failed" in text
    assert "clusterer" in text


def test_the_command_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An installed package has the tables too, and the time limit names the runs that are left."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--table", "5", "--dataset", "synthetic", "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", ["reid", "reproduce", *arguments, "--hours", "1e-9"])
    assert reid_command() == 3
    said = capsys.readouterr()
    assert f"{3 * len(TRAINED)} of {3 * len(TRAINED)} runs are left" in said.err
    assert said.err.endswith(f"\nreid reproduce {' '.join(arguments)} --hours 1e-9\n")
    assert "no code was found" in said.out
    assert (tmp_path / "logs/reproduce/synthetic/table_5.md").is_file()


def test_a_data_set_that_is_missing_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    arguments = ["reproduce.py", "--table", "1", "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("tools/reproduce.py", run_name="__main__")
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "market failed: DataError" in said.out
    assert "withdrawn" in said.err  # DukeMTMC-reID needs ACCEPT_WITHDRAWN
    assert "msmt failed: DataError" in said.out
