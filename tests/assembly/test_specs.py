"""Specs are checked before the first image is looked for."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reid.assembly.criterion
import reid.assembly.data
import reid.assembly.hooks
import reid.assembly.images
import reid.assembly.labelling
import reid.assembly.network
import reid.assembly.sampler
from reid import registry
from reid.assembly.specs import RUNTIME, check_specs
from reid.config import load_config
from reid.registry import HOOK, LOSS, ConfigError, Hook
from reid.workflows.train import train

ROOT = Path(__file__).parents[2]
CONFIG = """
DATASETS: {TRAIN: Market1501, TEST: [MSMT17]}
DATALOADER: {SAMPLER: {NAME: PKSampler, BATCH_SIZE: 16}}
MODEL: {BACKBONE: {NAME: TimmBackbone, MODEL: test_resnet}}
CRITERION: [Triplet, {NAME: CrossEntropy, WEIGHT: 2}]
CLUSTERER: {NAME: JaccardDBSCAN}
DEVICE: cpu
"""


@HOOK.register()
class OpensSomething(Hook):
    """A hook of a plug-in, which the check must not build."""

    def __init__(self, period: int = 1) -> None:
        raise AssertionError("was built")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


WRONG = [
    ("MODEL.BACKBONE.NAME", "TimBackbone", r"model\.backbone\.name: .*mean 'TimmBackbone'"),
    ("MODEL.BACKBONE", "{NAME: TimmBackbone}", r"model\.backbone\.model: .*needs this option"),
    ("MODEL.BACKBONE.IMAGE_SIZE", "[2, 2]", r"model\.backbone\.image_size: comes from the data"),
    ("MODEL.BACKBONE.PRETRAIN_PATH", "a.pth", r"here it is model\.backbone_weights"),
    ("MODEL.HEAD", "{NAME: BNNeckHead, NECK_FEATURE: befor}", r"model\.head\.neck_.*mean 'before'"),
    ("DATASETS.TRAIN", "Market1051", r"datasets\.train\.name: .*mean 'Market1501'"),
    ("DATASETS.TRAIN", "[Market1501, {NAME: Folder}]", r"datasets\.train\[1\]\.path: Folder needs"),
    ("DATASETS.TRAIN.LEAVE_OUT", "3", r"datasets\.train\.leave_out: expected a file, got 3"),
    ("DATASETS.TEST.0.VERSION", "V3", r"datasets\.test\[0\]\.version: expected one of"),
    ("INPUT.TRANSFORMS.1.PDA", "3", r"input\.transforms\[1\]\.pda: .*mean 'pad'"),
    ("INPUT.TRANSFORMS.0.PROB", "1.5", r"input\.transforms\[0\] \(RandomFlip\): prob"),
    ("DATALOADER.SAMPLER", "{NAME: PKSampler}", r"dataloader\.sampler\.batch_size: .*is missing"),
    ("DATALOADER.SAMPLER.BATCH_SIZE", "17", r"dataloader\.sampler \(PKSampler\): batch_size"),
    ("DATALOADER.SAMPLER.BATCH_SIZE", "1000000000000", r"batch_size: expected a number from 1 to"),
    ("CRITERION.0.MARGIN", "wide", r"criterion\[0\]\.margin: expected float, got 'wide'"),
    ("CRITERION.0.MARGIN", "-1", r"criterion\[0\]\.margin: expected"),
    ("CRITERION.1.SMOOTHING", "[1]", r"criterion\[1\]\.smoothing: expected float"),
    ("CRITERION.1.WEIGHT", ".inf", r"criterion\[1\]\.weight: expected a number from 0"),
    ("CRITERION", "[]", r"criterion: expected a list of losses, but it is empty"),
    (
        "CRITERION",
        "[{NAME: ClusterContrastLoss, TEMPERATURE: .inf}]",
        r"temperature: .*a number",
    ),
    ("CLUSTERER", "{NAME: KMeans}", r"clusterer\.num_clusters: KMeans needs this option \(int\)"),
    ("CLUSTERER.EPS", "-1", r"clusterer \(JaccardDBSCAN\): eps"),
    ("CLUSTERER.MIN_SAMPLES", str(2**70), r"clusterer\.min_samples: expected a number from"),
    ("TEST.EVALUATOR.RANKS", "[1, a]", r"test\.evaluator\.ranks\[1\]: expected int, got 'a'"),
    ("TEST.EVALUATOR.ALPHA", "-1", r"test\.evaluator \(Market1501Evaluator\): .*alpha"),
    ("HOOKS", "[WriteClustres]", r"hooks\[0\]\.name: .*mean 'WriteClusters'"),
    ("HOOKS", "[{NAME: OpensSomething, PERIOD: x}]", r"hooks\[0\]\.period: expected int"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_wrong_spec_is_named_before_data_is_looked_for(
    file: Path, key: str, value: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config(file, [key, value]))


@pytest.mark.parametrize("mode", [[], ["--eval-only"]])
def test_the_tool_ends_with_one_line_and_exit_code_2(
    file: Path, mode: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = ROOT / "tools" / "train_net.py"
    arguments = [*mode, "PLUGINS", "[tmgf]", "MODEL.BACKBONE.NAME", "IBNVit"]
    monkeypatch.setattr(sys, "argv", [str(tool), "--config-file", str(file), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(tool), run_name="__main__")
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ConfigError: model.backbone.name: 'IBNVit' is not registered")
    assert "did you mean 'IBNViT'" in last


def test_right_specs_pass_and_hooks_are_not_built(file: Path) -> None:
    check_specs(load_config(file, ["HOOKS", "[OpensSomething, WriteClusters]"]), training=True)


def test_an_evaluation_needs_no_parts_of_training(file: Path) -> None:
    pairs = ["CRITERION", "[]", "DATALOADER.SAMPLER", "{}", "DATASETS.TRAIN", "null"]
    config = load_config(file, pairs)
    check_specs(config, training=False)
    with pytest.raises(ConfigError, match=r"datasets\.train: expected a dataset"):
        check_specs(config, training=True)


class _Recorded(dict[str, set[str]]):
    """Registry -> names of the facts that its parts received."""

    def build(self, registry: Any, spec: object, where: str, **runtime: object) -> Any:
        self.setdefault(registry._name, set()).update(runtime)
        return _build(registry, spec, where, **runtime)


_build = registry.build


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Recorded]:
    facts = _Recorded()
    assembly = reid.assembly
    for module in (assembly.criterion, assembly.data, assembly.hooks, assembly.images,
                   assembly.labelling, assembly.network, assembly.sampler):  # fmt: skip
        monkeypatch.setattr(module, "build", facts.build)
    return facts


def test_runtime_lists_the_facts_that_a_run_gives(
    train_tiny: Any, recorded: _Recorded, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(CONFIG)
    train_tiny(tmp_path / "a.yaml", "run", "HOOKS", "[WriteClusters]", "CRITERION", "[Triplet]",
               "SOLVER.MAX_EPOCHS", "1", "DATASETS.TEST", "[]")  # fmt: skip
    assert len(recorded) == 9
    assert {name: facts for name, facts in recorded.items() if facts} == {
        name: set(facts) for name, facts in RUNTIME.items()
    }


def test_a_loss_that_needs_facts_is_checked_but_not_built(file: Path) -> None:
    @LOSS.register()
    class CountsClasses:
        def __init__(self, num_classes: int, scale: float = 1.0) -> None:
            raise AssertionError("was built")

    try:
        check_specs(load_config(file, ["CRITERION", "CountsClasses"]), training=True)
        with pytest.raises(ConfigError, match=r"criterion\[0\]\.scale: expected float"):
            check_specs(
                load_config(file, ["CRITERION", "{NAME: CountsClasses, SCALE: x}"]), training=True
            )
    finally:
        LOSS._obj_map.pop("CountsClasses")
