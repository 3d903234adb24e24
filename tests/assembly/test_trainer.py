"""Builds training runs and checks their logs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from reid.assembly.images import build_test_sets
from reid.assembly.network import build_model, build_trained_model, load_model_weights
from reid.assembly.splits import count_splits, log_dataset
from reid.config import Config, DatasetsConfig, ModelConfig
from reid.engine.testing import QueryGallery
from reid.evaluation.extract import ImageSet
from reid.modeling.backbones import TimmBackbone
from reid.modeling.weights import WeightsError, save_weights
from reid.structures import ImageRecord

TRAIN = [ImageRecord("a.jpg", 1, 0), ImageRecord("b.jpg", 1, 1), ImageRecord("c.jpg", 4, 1)]
QUERY, GALLERY = [ImageRecord("d.jpg", 9, -1)], [ImageRecord("e.jpg", -1, -1)]


def table(caplog: pytest.LogCaptureFixture) -> list[list[str]]:
    return [line.split() for line in caplog.messages[-1].splitlines()[1:]]


def test_the_table_counts_and_names_the_version(caplog: pytest.LogCaptureFixture) -> None:
    test_set = QueryGallery("Other", QUERY, GALLERY, ImageSet("Other", [*QUERY, *GALLERY], []))
    with caplog.at_level(logging.INFO):
        log_dataset(count_splits("MSMT17", TRAIN, [test_set], "MSMT17_V1"))
    header, _, *rows = table(caplog)
    assert header == ["dataset", "split", "images", "identities", "cameras", "version"]
    assert rows == [
        ["MSMT17", "train", "3", "2", "2", "MSMT17_V1"],
        ["Other", "query", "1", "1", "unknown"],
        ["Other", "gallery", "1", "unlabelled", "unknown"],
    ]


def test_no_column_for_versions_where_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_dataset(count_splits("Own", TRAIN, []))
    assert table(caplog)[0] == ["dataset", "split", "images", "identities", "cameras"]


def test_a_test_set_knows_the_version_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REID_DATASETS", str(tmp_path))
    name = "0000/0000_000_02_0303morning_0015_0.jpg"
    image = tmp_path / "MSMT17_V2" / "mask_test_v2" / name
    image.parent.mkdir(parents=True)
    image.touch()
    for split in ("query", "gallery"):
        (tmp_path / "MSMT17_V2" / f"list_{split}.txt").write_text(f"{name} 0\n")
    (test_set,) = build_test_sets(Config(datasets=DatasetsConfig(test=["MSMT17"])), check=False)
    assert (test_set.name, test_set.version) == ("MSMT17", "MSMT17_V2")


def test_a_warning_if_weights_were_trained_with_other_pixel_statistics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = TimmBackbone("test_resnet", (64, 32)).state_dict()
    statistics = {"pixel_mean": "[0.5, 0.5, 0.5]", "pixel_std": "[0.229, 0.224, 0.225]"}
    save_weights(tmp_path / "w.safetensors", state, statistics)
    backbone = {"name": "TimmBackbone", "model": "test_resnet"}
    weights = str(tmp_path / "w.safetensors")
    config = Config(model=ModelConfig(backbone=backbone, backbone_weights=weights))
    build_model(config, (64, 32), 0)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "input.pixel_mean is [0.485, 0.456, 0.406]" in warnings[0]
    assert "was trained with [0.5, 0.5, 0.5]" in warnings[0]
    config.input.pixel_mean = [0.5, 0.5, 0.5]
    caplog.clear()
    build_model(config, (64, 32), 0)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    for wrong in ("a few", "[1, 2]", '["a", "b", "c"]', "[" * 100_000):
        save_weights(tmp_path / "w.safetensors", state, {"pixel_std": wrong})
        with pytest.raises(
            WeightsError, match=r"w\.safetensors: expected three numbers as pixel_s"
        ):
            build_model(config, (64, 32), 0)


def test_going_on_from_a_whole_model_warns_of_other_pixel_statistics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = {"name": "TimmBackbone", "model": "test_resnet"}
    config = Config(model=ModelConfig(backbone=backbone))
    model = build_model(config, (64, 32), 0)
    path = tmp_path / "whole.safetensors"
    save_weights(path, model.state_dict(), {"pixel_mean": "[0.5, 0.5, 0.5]"})
    config.model.weights = str(path)
    load_model_weights(model, config, cameras=[])
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "input.pixel_mean is [0.485, 0.456, 0.406]" in warning
    assert f"{path} was trained with [0.5, 0.5, 0.5]" in warning


def test_weights_of_a_whole_model_need_no_backbone_weights(tmp_path: Path) -> None:
    backbone = {"name": "TimmBackbone", "model": "test_resnet"}
    trained = build_model(Config(model=ModelConfig(backbone=backbone)), (64, 32), 0)
    save_weights(tmp_path / "whole.safetensors", trained.state_dict(), {})
    config = Config(model=ModelConfig(backbone=backbone, backbone_weights="gone.safetensors"))
    with pytest.raises(WeightsError, match=r"gone\.safetensors"):
        build_model(config, (64, 32), 0)
    config.model.weights = str(tmp_path / "whole.safetensors")
    torch.testing.assert_close(
        build_trained_model(config, (64, 32)).state_dict(), trained.state_dict()
    )
