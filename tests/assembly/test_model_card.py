from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reid.assembly.cameras import Camera, match_camera
from reid.assembly.model_card import ModelCard
from reid.config import InputConfig
from reid.modeling.weights import WeightsError

CAMERAS = [
    Camera("shop", 0, "entrance"),
    Camera("shop", 1, "exit", seen=False),
    Camera("Market-1501", 4),
    Camera("garage", 0, "entrance"),
]


def card(cameras: list[Camera] | None = CAMERAS) -> ModelCard:
    settings = InputConfig(size=(64, 32), pixel_mean=(0.5, 0.4, 0.3), test_interpolation="bilinear")
    return ModelCard.of(settings, cameras, 8, {"weights_sha256": "ab"}, flip=True)


def test_json_gives_the_same_card():
    assert ModelCard.from_json(card().to_json(), "m.onnx") == card()
    assert ModelCard.from_json(card(None).to_json(), "m.onnx") == card(None)


def test_json_is_as_the_docs_say():
    content = json.loads(card().to_json())
    assert content["size"] == [64, 32]
    assert content["cameras"] == [
        ["shop", "entrance"], None, ["Market-1501", "4"], ["garage", "entrance"],
    ]  # fmt: skip
    assert content["interpolation"] == "bilinear"
    assert content["dimension"] == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", [64]), ("mean", "grey"), ("interpolation", "nearest"), ("cameras", [[1, 2]])],
)
def test_wrong_values_name_file_and_key(key, value):
    content = json.loads(card().to_json()) | {key: value}
    with pytest.raises(WeightsError, match=rf"m\.onnx.*reid\.{key}"):
        ModelCard.from_json(json.dumps(content), "m.onnx")


def test_text_that_is_no_json_is_refused():
    with pytest.raises(WeightsError, match=r"m\.onnx"):
        ModelCard.from_json("{", "m.onnx")


def test_cameras_by_number_name_and_data_set():
    known = card()
    assert known.camera_number(0) == 0
    assert known.camera_number(("garage", "entrance")) == 3
    assert known.camera_number("4") == 2
    assert known.camera_number(None) == known.camera_number(-1) == -1


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        ("entrance", "several.*'shop'.*'garage'"),
        ("roof", "not learned it; it knows 0 'entrance'"),
        (1, "not learned"),
        (9, "not learned"),
        (True, "not learned"),
    ],
)
def test_cameras_that_are_not_one(camera, message):
    with pytest.raises(ValueError, match=message):
        card().camera_number(camera)


def test_a_model_without_cameras_takes_none():
    assert card(None).camera_number(None) == -1
    assert card([]).cameras is None
    with pytest.raises(ValueError, match="has not learned cameras"):
        card(None).camera_number("entrance")


def test_data_sets_find_their_cameras_by_the_card():
    learned = card().learned_cameras()
    assert match_camera(learned, "garage", 7, "entrance") == 3
    assert match_camera(learned, "Market-1501", 4, "") == 2
    assert match_camera(learned, "shop", 1, "exit") is None


def test_the_fingerprint_is_of_weights_and_input():
    assert replace(card(), cameras=None).fingerprint == card().fingerprint
    assert replace(card(), flip=False).fingerprint != card().fingerprint
    other = replace(card(), provenance={"weights_sha256": "cd"})
    assert other.fingerprint != card().fingerprint
