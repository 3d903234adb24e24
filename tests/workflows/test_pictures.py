"""tools/visualize.py: from the folder of a run, or a config and weights, to PNG files."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reid.assembly.network import build_model
from reid.assembly.plugins import register_parts
from reid.config import dump_config, load_config
from reid.modeling.weights import save_weights
from reid.registry import ConfigError
from reid.workflows.pictures import pick_images
from reid.workflows.trained import load_trained, split_settings

TOOL = str(Path(__file__).parents[2] / "tools" / "visualize.py")
DATA = (
    "{NAME: SyntheticPersons, NUM_TRAIN: 6, NUM_TEST: 4, NUM_CAMERAS: 3, NUM_DISTRACTORS: 2, "
    "HEIGHT: 32, WIDTH: 16, SEED: 3}"
)
NET = "EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 3"
PLAIN = f"""
DATASETS: {{TRAIN: {DATA}}}
INPUT: {{SIZE: [48, 32]}}
MODEL: {{BACKBONE: {{NAME: ViT, {NET}}}}}
CLUSTERER: {{NAME: KMeans, NUM_CLUSTERS: 5}}
TEST: {{BATCH_SIZE: 64}}
DEVICE: cpu
"""
BRANCHES = f"""
_BASE_: plain.yaml
PLUGINS: [tmgf]
MODEL: {{BACKBONE: {{NAME: IBNViT, {NET}, STEM_CHANNELS: 8}}, HEAD: {{NAME: TMGFHead}}}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders `plain` and `branches`, as after a run."""
    root = tmp_path_factory.mktemp("runs")
    (root / "plain.yaml").write_text(PLAIN)
    (root / "branches.yaml").write_text(BRANCHES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATASETS", str(root / "datasets"))
        torch.manual_seed(0)
        for name in ("plain", "branches"):
            config = load_config(root / f"{name}.yaml")
            register_parts(config)
            (root / name).mkdir()
            (root / name / "config.yaml").write_text(dump_config(config))
            steps = [f'{{"kind": "train", "step": {step}, "epoch": 0}}\n' for step in (15, 30)]
            (root / name / "metrics.json").write_text("".join(steps))
            model = build_model(config, (48, 32), 3)
            save_weights(root / name / "model_final.safetensors", model.state_dict(), {})
        yield root


def pictures_of(run: Path) -> dict[str, list[tuple[int, int, int]]]:
    """Step, width and height of the pictures in a run's TensorBoard, by name."""
    if not (run / "pictures").is_dir():
        return {}
    events = EventAccumulator(str(run / "pictures"))
    events.Reload()
    return {
        name: [(image.step, image.width, image.height) for image in events.Images(name)]
        for name in events.Tags()["images"]
    }


def draw(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(TOOL, run_name="__main__")
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["rollout", "--count", 2, "--heads", "max"],
        ["stripes", "--count", 2],
        ["ranked", "--count", 2],
        ["clusters", "--count", 2, "--columns", 3],
        ["embed", "--colour", "identity"],
        ["embed", "--colour", "cluster"],
        ["histogram"],
    ],
    ids=lambda command: "-".join(map(str, command[:3:2])),
)
def test_every_picture(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[Any]
) -> None:
    output = tmp_path / "out.png"
    code, error = draw(capsys, *command, "--model", runs / "branches", "--output", output)
    assert (code, error) == (0, "")
    with Image.open(output) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert pictures_of(runs / "branches")["pictures/out"][-1] == (30, *picture.size)


def test_pictures_are_shown_in_the_runs_they_are_of(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--model", runs / "plain", "--model", runs / "branches"]
    file, weights = runs / "plain.yaml", runs / "plain" / "model_final.safetensors"
    shutil.copy(weights, tmp_path / "alone.safetensors")
    for models, places, name in (
        (both, {"plain", "branches"}, "two"),
        (["--model", file, weights], {"plain"}, "in_a_folder"),
        (["--model", file, tmp_path / "alone.safetensors"], set(), "elsewhere"),
        ([*both, "--no-tensorboard"], set(), "none"),
    ):
        output = tmp_path / f"{name}.png"
        assert draw(capsys, "rollout", *models, "--count", 1, "--output", output)[0] == 0
        shown = {run for run in ("plain", "branches")
                 if f"pictures/{name}" in pictures_of(runs / run)}  # fmt: skip
        assert shown == places


def test_models_side_by_side(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    file, weights = runs / "plain.yaml", runs / "plain" / "model_final.safetensors"
    assert draw(capsys, "rollout", "--model", file, weights, "--output", one)[0] == 0
    models = ["--model", file, weights, "--model", runs / "branches"]
    assert draw(capsys, "rollout", *models, "--output", two)[0] == 0
    with Image.open(one) as first, Image.open(two) as second:
        assert second.width > first.width + 3 * 96  # the other model, its two branches
        assert second.height == first.height


def test_features_of_any_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    arrays = {"query_feat": random.normal(size=(6, 4)), "gallery_feat": random.normal(size=(9, 4))}
    arrays |= {"query_pids": np.arange(6) % 3, "gallery_pids": np.arange(9) % 3}
    arrays |= {"query_camids": np.zeros(6, int), "gallery_camids": np.ones(9, int)}
    np.savez(tmp_path / "f.npz", **arrays)
    for command in (["histogram"], ["embed", "--colour", "camera"]):
        output = tmp_path / f"{command[0]}.png"
        features = ["--features", tmp_path / "f.npz", "--output", output]
        assert draw(capsys, *command, *features) == (0, "")
        assert output.is_file()


def test_images_of_ones_own(runs: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 80)).save(tmp_path / "me.png")
    trained = load_trained(runs / "plain")
    records, dataset = pick_images(trained, 3, [tmp_path / "me.png"])
    assert [record.path for record in records] == [str(tmp_path / "me.png")]
    assert dataset is None
    assert len(pick_images(trained, 3)[0]) == 3
    batch = trained.batch(*pick_images(trained, 2))
    assert batch.image.shape == (2, 3, 48, 32)
    assert bool((batch.camid >= 0).all())


def test_each_model_is_shown_the_cameras_that_it_knows(runs: Path, tmp_path: Path) -> None:
    """The model sees cameras as in its evaluation: those of other sets are unknown."""
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (16, 32)).save(other / "0.png")
    (other / "list.csv").write_text("path,pid,camid,split\n0.png,0,1,query\n0.png,0,0,gallery\n")
    foreign = f"[{{NAME: CSV, PATH: {other / 'list.csv'}}}]"
    joined = f"[{DATA}, {{NAME: CSV, PATH: {other / 'list.csv'}, TRAIN_SPLIT: query}}]"
    at_home = load_trained(runs / "plain")
    abroad = load_trained(runs / "plain", overrides=["DATASETS.TEST", foreign])
    both = load_trained(runs / "plain", overrides=["DATASETS.TRAIN", joined])
    own, foreigners = pick_images(at_home, 3), pick_images(abroad, 3)
    numbers = [record.camid for record in own[0]]
    assert [record.camid for record in foreigners[0]] == [1]
    for trained, expected in ((at_home, numbers), (abroad, numbers), (both, numbers)):
        assert trained.batch(*own).camid.tolist() == expected
    for trained, camid in ((at_home, -1), (abroad, -1), (both, 3)):
        assert trained.batch(*foreigners).camid.tolist() == [camid]
        if trained is abroad:
            assert next(iter(trained.test_set().images.loader)).camid.tolist() == [-1, -1]


def test_errors(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", tmp_path / "out.png"]
    for arguments, message in (
        (["histogram"], "expected --model"),
        (["stripes", "--model", runs / "plain"], "BNNeckHead cuts no parts"),
        (["ranked", "--model", tmp_path], "config.yaml' does not exist"),
        (
            ["clusters", "--model", runs / "plain", "--set", "CLUSTERER", "null"],
            "clusterer: expected one",
        ),
        (["clusters", "--model", runs / "plain", "CLUSTERER", "null"], "clusterer: expected one"),
        (
            ["clusters", "--model", runs / "plain", "--count", 2, "CLUSTERER", "null"],
            "clusterer: expected one",
        ),
        (["ranked", *["--model", runs / "plain"] * 2], "expected one --model, got 2"),
        (["ranked", "--model", *[runs / "plain"] * 3], "--model: expected a run's folder"),
    ):
        code, error = draw(capsys, *arguments, *output)
        assert code == 2
        assert message in error
    (tmp_path / "config.yaml").write_text(PLAIN)
    with pytest.raises(ConfigError, match="has neither"):
        load_trained(tmp_path)
    assert not (tmp_path / "out.png").exists()


def test_settings_stand_at_the_end_as_for_all_tools(runs: Path) -> None:
    folder = str(runs / "plain")
    assert split_settings([folder]) == ([runs / "plain"], [])
    words = [folder, "DATASETS.TEST", "[{NAME: CSV, PATH: a//b.csv}]", "device", "cpu"]
    assert split_settings(words) == ([runs / "plain"], words[1:])
    assert split_settings(["a.yaml", "w.pth", "SEED", "2"]) == (
        [Path("a.yaml"), Path("w.pth")],
        ["SEED", "2"],
    )
