"""Training goes on from trained weights with other cameras, persons, image sizes and labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reid.config import load_config
from reid.modeling.convert import convert_weights
from reid.modeling.weights import WeightsError, read_checkpoint, read_metadata
from reid.workflows.evaluate import evaluate
from reid.workflows.train import train

BASE = """
PLUGINS: [tmgf]
DATASETS: {TRAIN: {NAME: SyntheticPersons, NUM_TRAIN: 10, NUM_TEST: 4, NUM_CAMERAS: 3,
                   NUM_DISTRACTORS: 2, HEIGHT: 48, WIDTH: 32}}
INPUT: {SIZE: [48, 32], PIXEL_MEAN: [0.4, 0.4, 0.4], TEST_INTERPOLATION: bilinear}
DATALOADER:
  NUM_WORKERS: 0
  SAMPLER: {NAME: ProxyBalancedSampler, BATCH_SIZE: 16, IMAGES_PER_PROXY: 4, STEPS_PER_EPOCH: 2}
MODEL:
  BACKBONE: {NAME: IBNViT, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 3, STEM_CHANNELS: 8, DROP_PATH: 0}
  HEAD: {NAME: TMGFHead, GRANULARITIES: [2]}
CRITERION: [O2CAPLoss]
CLUSTERER: {NAME: CameraProxyClusterer, K1: 6, K2: 2, EPS: 0.8, MIN_SAMPLES: 2}
SOLVER: {MAX_EPOCHS: 1}
DEVICE: cpu
"""
OTHERS = "{NAME: SyntheticPersons, SEED: 1, NUM_TRAIN: 9, NUM_TEST: 4, NUM_CAMERAS: 3, " \
         "NUM_DISTRACTORS: 2, HEIGHT: 48, WIDTH: 32}"  # fmt: skip
TABLE = "backbone.camera_embed"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("going_on")


@pytest.fixture(autouse=True)
def drawn_here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REID_DATASETS", str(root / "datasets"))


@pytest.fixture(scope="module")
def weights(root: Path) -> Path:
    (root / "base.yaml").write_text(BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATASETS", str(root / "datasets"))
        train(load_config(root / "base.yaml", ["OUTPUT_DIR", str(root / "old")]))
    return root / "old" / "model_final.safetensors"


def go_on(root: Path, name: str, *pairs: str) -> dict[str, torch.Tensor]:
    train(load_config(root / "base.yaml", ["OUTPUT_DIR", str(root / name), *pairs]))
    return read_checkpoint(root / name / "model_final.safetensors")[0]


def log_of(root: Path, name: str) -> list[str]:
    (log,) = (root / name).glob("log*.txt")
    lines = log.read_text().splitlines()
    return [line.partition("  ")[2] for line in lines]


def test_other_cameras_start_from_the_mean_even_if_as_many(root: Path, weights: Path) -> None:
    still = ("SOLVER.BASE_LR", "1e-12", "MODEL.WEIGHTS", str(weights))
    new = go_on(root, "others", "DATASETS.TRAIN", OTHERS, *still)[TABLE]
    assert any(" knows 0 of 3 by data set and name" in m for m in log_of(root, "others"))
    old = read_checkpoint(weights)[0][TABLE]
    torch.testing.assert_close(new, old.mean(0).expand_as(new), rtol=0, atol=1e-6)
    same = go_on(root, "same", *still)[TABLE]
    torch.testing.assert_close(same, old, rtol=0, atol=1e-6)


def test_other_size_and_labels_in_place_of_clusters(root: Path, weights: Path) -> None:
    supervised = "[{NAME: CrossEntropy}, {NAME: Triplet, BANKS: all}]"
    pairs = ["CLUSTERER", "null", "CRITERION", supervised, "INPUT.SIZE", "[64, 32]"]
    pairs += ["DATASETS.TRAIN", OTHERS, "MODEL.WEIGHTS", str(weights)]
    state = go_on(root, "labels", *pairs)
    assert state["backbone.net.pos_embed"].shape == (1, 1 + 4 * 2, 24)


def test_weights_say_how_they_were_trained(weights: Path) -> None:
    for path in (weights, weights.with_name("model_best.safetensors")):
        about = read_metadata(path)
        assert json.loads(about["image_size"]) == [48, 32]
        assert json.loads(about["pixel_mean"]) == [0.4, 0.4, 0.4]
        assert json.loads(about["interpolation"]) == "bilinear"
        assert [camera[1:] for camera in json.loads(about["cameras"])] == [
            [0, "", True], [1, "", True], [2, "", True],
        ]  # fmt: skip
        assert json.loads(about["identities"]) == 10
        assert json.loads(about["feature_dim"]) == 24
        assert json.loads(about["backbone"])["name"] == "IBNViT"
        assert json.loads(about["head"]) == {"name": "TMGFHead", "granularities": [2]}
        assert about["epoch"] == "1"
        assert "reid_version" in about


def test_an_evaluation_takes_its_settings_from_the_weights(root: Path, weights: Path) -> None:
    (root / "bare.yaml").write_text("DATALOADER: {NUM_WORKERS: 0}\nDEVICE: cpu\n")
    final = json.loads((weights.parent / "results.json").read_text())["final"][0]["numbers"]
    train_set = load_config(root / "base.yaml").datasets.train
    spec = "{" + ", ".join(f"{k.upper()}: {v}" for k, v in train_set.items()) + "}"
    pairs = ["DATASETS.TEST", spec, "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(root / "eval")]
    (numbers,) = evaluate(load_config(root / "bare.yaml", pairs)).values()
    assert numbers == pytest.approx(final)
    assert not [line for line in log_of(root, "eval") if line.startswith("WARNING")]
    evaluate(load_config(root / "bare.yaml", [*pairs, "INPUT.SIZE", "[64, 32]"]))
    assert [line for line in log_of(root, "eval") if line.startswith("WARNING")] == [
        f"WARNING: input.size is [64, 32], but {weights} was trained with [48, 32]; "
        "results may be worse"
    ]


def test_a_backbone_without_its_head_can_be_evaluated(root: Path, weights: Path) -> None:
    resnet = "{NAME: TimmBackbone, MODEL: test_resnet}"
    pairs = ["MODEL.BACKBONE", resnet, "MODEL.HEAD", "BNNeckHead"]
    go_on(root, "resnet", *pairs)
    path = str(root / "resnet" / "model_final.safetensors")
    pairs += ["MODEL.BACKBONE_WEIGHTS", path, "OUTPUT_DIR", str(root / "alone")]
    evaluate(load_config(root / "base.yaml", pairs))
    line = f"Only the backbone's weights are given ({path}): neck and head are untrained"
    assert line in log_of(root, "alone")
    # its file knows size and statistics, whatever it is called
    (root / "bare.yaml").write_text("DATALOADER: {NUM_WORKERS: 0}\nDEVICE: cpu\n")
    renamed = root / "resnet" / "renamed.pth"
    renamed.write_bytes(Path(path).read_bytes())
    train_set = load_config(root / "base.yaml").datasets.train
    spec = "{" + ", ".join(f"{k.upper()}: {v}" for k, v in train_set.items()) + "}"
    bare = ["DATASETS.TEST", spec, "MODEL.BACKBONE_WEIGHTS", str(renamed)]
    bare += ["OUTPUT_DIR", str(root / "bare_alone")]
    evaluate(load_config(root / "bare.yaml", bare))
    log = log_of(root, "bare_alone")
    assert f"input.size is [48, 32], as {renamed} was trained" in log
    assert not [line for line in log if line.startswith("WARNING")]
    evaluate(load_config(root / "bare.yaml", [*bare, "INPUT.PIXEL_MEAN", "[0.1, 0.1, 0.1]"]))
    assert [line for line in log_of(root, "bare_alone") if line.startswith("WARNING")] == [
        f"WARNING: input.pixel_mean is [0.1, 0.1, 0.1], but {renamed} was trained with "
        "[0.4, 0.4, 0.4]; results may be worse"
    ]


def test_a_backbone_whose_head_has_the_last_layer_leads_to_the_whole_model(
    root: Path, weights: Path
) -> None:
    cut = root / "cut.safetensors"
    report = str(convert_weights(weights, cut, part="backbone"))
    assert "WARNING     1 of 2 layers are in the head, so this backbone" in report
    assert report.endswith(f"go on from the whole model with MODEL.WEIGHTS {weights}")
    assert "cameras" not in read_metadata(cut)
    whole = r"model\.weights takes that model, model_final\.safetensors$"
    with pytest.raises(WeightsError, match=whole):
        go_on(root, "cut", "DATASETS.TRAIN", OTHERS, "MODEL.BACKBONE_WEIGHTS", str(cut))
    alone = r"only a backbone\. To go on from its whole model, set model\.weights to model_final"
    with pytest.raises(WeightsError, match=alone):
        go_on(root, "cut", "DATASETS.TRAIN", OTHERS, "MODEL.WEIGHTS", str(cut))


def test_weights_without_camera_embeddings_go_on_with_them(root: Path) -> None:
    plain = ("MODEL.BACKBONE", "{NAME: ViT, STEM: ibn, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 3, "
             "STEM_CHANNELS: 8}", "MODEL.HEAD", "BNNeckHead", "CRITERION", "[Triplet]")  # fmt: skip
    before = go_on(root, "plain", *plain)
    assert TABLE not in before
    path = str(root / "plain" / "model_final.safetensors")
    pairs = (*plain, "MODEL.BACKBONE.CAMERA_EMBEDDING", "true", "MODEL.WEIGHTS", path)
    after = go_on(root, "with_cameras", *pairs, "SOLVER.BASE_LR", "1e-12")
    assert after[TABLE].shape[0] == 3
    torch.testing.assert_close(after["backbone.net.pos_embed"], before["backbone.net.pos_embed"])
    line = f"Cameras: {path} has no camera embeddings; those here start anew"
    assert line in log_of(root, "with_cameras")
