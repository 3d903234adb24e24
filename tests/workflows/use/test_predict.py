"""The Predictor gives what `--eval-only` compares, of whatever it is handed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import reid
from reid.assembly.model_card import METADATA_KEY
from reid.modeling.weights import WeightsError, read_checkpoint, save_weights
from reid.registry import ConfigError
from reid.structures import Batch, DataError
from reid.workflows.predict import Predictor

if TYPE_CHECKING:
    from tests.workflows.use.conftest import Run


@pytest.fixture(scope="module")
def predictor(run: Run) -> Predictor:
    return Predictor(run.folder)


def pixels(seed: int = 0, height: int = 50, width: int = 22) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_features_are_those_of_the_evaluation(run: Run, predictor: Predictor) -> None:
    cameras = [record.camid for record in run.test_set.query]
    features = predictor(run.test_set.query_paths, cameras)
    assert features.dtype == np.float32
    assert features.shape == (len(run.query), predictor.dimension)
    np.testing.assert_allclose(features, run.query.test.numpy(), atol=1e-6, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_other_batches_give_the_same(run: Run, predictor: Predictor) -> None:
    paths = run.test_set.gallery_paths
    one_by_one = Predictor(run.folder, batch_size=1)
    np.testing.assert_allclose(one_by_one(paths), predictor(paths), atol=1e-6, rtol=0)


def test_a_camera_that_is_not_named_is_an_unknown_one(run: Run, predictor: Predictor) -> None:
    path = run.test_set.query_paths[0]
    assert not np.allclose(predictor(path), predictor(path, 0), atol=1e-4)
    assert np.array_equal(predictor(path), predictor(path, -1))
    assert np.array_equal(predictor([path, path], [0, None])[1:], predictor([path] * 2)[1:])
    names = predictor.card.cameras
    assert names is not None
    site, name = names[1]
    assert np.array_equal(predictor(path, name), predictor(path, 1))
    assert np.array_equal(predictor([path], [(site, name)]), predictor(path, 1))


def test_settings_of_the_config_count(run: Run, predictor: Predictor) -> None:
    path = run.test_set.query_paths[0]
    assert predictor.card.flip
    assert predictor.card.size == (48, 32)
    assert predictor.card.interpolation == "bilinear"
    plain = Predictor(run.folder, overrides=["TEST.FLIP", "false"])
    assert not np.allclose(plain(path), predictor(path), atol=1e-5)
    assert plain.fingerprint != predictor.fingerprint
    half = Predictor(run.folder, precision="bf16")(path)
    assert half.dtype == np.float32
    assert 1e-6 < np.abs(half - predictor(path)).max() < 0.1


def test_weights_say_how_their_input_is_made(run: Run, predictor: Predictor) -> None:
    alone = Predictor(run.weights, overrides=["TEST.FLIP", "true", "DEVICE", "cpu"])
    paths = run.test_set.query_paths
    np.testing.assert_allclose(alone(paths), predictor(paths), atol=1e-6, rtol=0)
    assert alone.fingerprint == predictor.fingerprint
    by_config = Predictor(run.folder / "config.yaml", run.weights)
    assert by_config.fingerprint == predictor.fingerprint
    assert np.array_equal(by_config(paths[0]), predictor(paths[0]))


def test_weights_that_say_nothing_need_a_config(run: Run, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_weights(bare, read_checkpoint(run.weights)[0], {})
    with pytest.raises(ConfigError, match="give a config file before it"):
        Predictor(bare)
    predictor = Predictor(run.folder / "config.yaml", bare)
    assert predictor.card.cameras == [("", "0"), ("", "1"), ("", "2")]
    assert not np.allclose(predictor(pixels(), 1), predictor(pixels()), atol=1e-4)


def test_all_kinds_of_pictures_give_the_same(predictor: Predictor, tmp_path: Path) -> None:
    array = pixels()
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = predictor(array)
    assert expected.shape == (1, predictor.dimension)
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(array), tensor,
             tensor.float() / 255, np.asfortranarray(array)]  # fmt: skip
    for kind in kinds:
        assert np.array_equal(predictor(kind), expected)
    for several in (array[None], tensor[None]):
        assert np.array_equal(predictor(several), expected)
    np.testing.assert_allclose(predictor(kinds), np.repeat(expected, 6, 0), atol=1e-6, rtol=0)
    assert np.array_equal(predictor(array[:, :, ::-1], bgr=True), expected)
    assert np.array_equal(predictor(tensor.flip(0), bgr=True), expected)
    assert np.array_equal(predictor(tmp_path / "a.png", bgr=True), expected)
    array.setflags(write=False)
    assert np.array_equal(predictor(array), expected)


def test_grey_is_three_equal_channels(predictor: Predictor) -> None:
    grey = pixels()[:, :, 0]
    expected = predictor(np.repeat(grey[:, :, None], 3, 2))
    for kind in (grey, grey[:, :, None], torch.from_numpy(grey)[None], Image.fromarray(grey)):
        assert np.array_equal(predictor(kind), expected)


def test_sizes_may_be_mixed_and_a_generator_may_give_them(predictor: Predictor) -> None:
    mixture = [pixels(0, 30, 10), Image.fromarray(pixels(1, 99, 60)), pixels(2, 48, 32)] * 4
    features = predictor(image for image in mixture)
    each = np.concatenate([predictor(image) for image in mixture])
    np.testing.assert_allclose(features, each, atol=1e-6, rtol=0)


def test_no_picture_gives_no_feature(predictor: Predictor) -> None:
    for nothing in ([], (), np.empty((0, 9, 9, 3), np.uint8)):
        assert predictor(nothing).shape == (0, predictor.dimension)
    assert predictor.boxes(pixels(), []).shape == (0, predictor.dimension)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pixels() / 255, r"image 0: expected a uint8 array.*float64.*multiply by 255"),
        (pixels().transpose(2, 0, 1), "channels last"),
        (np.zeros((4, 5, 4), np.uint8), "alpha"),
        (np.zeros((0, 5, 3), np.uint8), "image 0"),
        (torch.zeros(9, 9, 3), r"expected a tensor \(3, height, width\)"),
        (torch.full((3, 9, 9), -1.0), "from 0 to 1, got -1 to -1"),
        (torch.full((3, 9, 9), float("nan")), "from 0 to 1"),
        (torch.zeros(3, 9, 9, dtype=torch.int64), "int64"),
        (3, "expected a picture or several, got int"),
        (b"x", "got bytes"),
        ([pixels(), [1]], "image 1: expected a path"),
        ([pixels()[None]], "image 0.*alone"),
        (Image.new("F", (3, 3)), "image 0: .*range"),
    ],
)
def test_what_is_no_picture_is_refused(predictor: Predictor, image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor(image)


def test_files_that_cannot_be_read_are_named(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg"):
        predictor([tmp_path / "gone.jpg"])
    with pytest.raises(DataError, match="is a folder, expected a picture"):
        predictor(tmp_path)


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ([0], "expected one for each picture, got 1"),
        ([0, 1, 2], "expected 2, one for each picture, got more"),
        (["nowhere", 0], "image 0: camera 'nowhere': the model has not learned it; it knows 0 '"),
        (7, "camera 7"),
        (0.5, "expected a name or number for all pictures, or a list of one for each, got 0.5"),
        (np.array(1), "a list of one for each, got array"),
    ],
)
def test_cameras_that_do_not_fit(predictor: Predictor, cameras: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor([pixels(0), pixels(1)], cameras)


def test_boxes_are_crops_of_the_frame(predictor: Predictor) -> None:
    frame = pixels(3, 120, 90)
    boxes = [[10, 20, 40, 100], [-5, -5, 30, 60], [60.4, 70.9, 200, 119.2], [0, 0, 90, 120]]
    crops = [frame[20:100, 10:40], frame[:60, :30], frame[70:120, 60:], frame]
    expected = predictor(crops, 2)
    assert np.array_equal(predictor.boxes(frame, boxes, 2), expected)
    assert np.array_equal(predictor.boxes(frame[:, :, ::-1], boxes, 2, bgr=True), expected)
    assert np.array_equal(predictor.boxes(frame, torch.tensor(boxes), [2] * 4), expected)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 9, 9], [5, 5, 5, 9]], r"without a pixel in the frame of 22 x 50: 1 \[5\.0"),
        ([[0, 0, 9, 9], [30, 0, 40, 9]], r"1 \[30\.0"),
        ([[9, 9, 3, 3]], r"0 \[9\.0"),
        ([[0, 0, float("nan"), 3]], "not finite: 0"),
        ([1, 2, 3, 4], r"expected \(M, 4\)"),
        ([[1, 2, 3]], r"expected \(M, 4\)"),
    ],
)
def test_boxes_that_are_none(predictor: Predictor, boxes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.boxes(pixels(), boxes)


def test_threads_give_what_one_gives(run: Run, predictor: Predictor) -> None:
    mixture = [pixels(seed, 30 + seed, 20) for seed in range(9)]
    paths = run.test_set.query_paths, run.test_set.gallery_paths
    jobs = [(paths[0], None), (paths[1], None), (mixture, 1), (pixels(4), 2)] * 3
    expected = [predictor(*job) for job in jobs]
    found: dict[int, npt.NDArray[np.float32]] = {}
    start = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        start.wait()
        found[number] = predictor(*jobs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, features in enumerate(expected):
        assert np.array_equal(found[number], features), number


def test_features_that_are_not_finite_are_told(run: Run, tmp_path: Path) -> None:
    broken = Predictor(run.folder)
    assert isinstance(broken.network._model, torch.nn.Module)  # type: ignore[attr-defined]
    with torch.no_grad():
        next(broken.network._model.parameters()).fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="image 0: its feature is not finite"):
        broken(pixels())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"precision": "fp8"}, "test.precision: expected one of"),
        ({"device": "tpu"}, "device: expected auto, cpu, cuda"),
        ({"overrides": ["TEST.FLOP", "1"]}, "test.flop: unknown key"),
    ],
)
def test_wrong_settings_name_their_key(run: Run, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Predictor(run.folder, **options)


def test_places_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        Predictor(tmp_path)
    with pytest.raises(WeightsError, match=r"gone\.onnx.*expected an ONNX file"):
        Predictor(tmp_path / "gone.onnx")
    with pytest.raises(WeightsError, match="no such"):
        Predictor(tmp_path / "gone.safetensors")


def test_load_model_gives_the_network(run: Run, predictor: Predictor) -> None:
    model = reid.load_model(run.folder)
    assert not model.training
    with torch.no_grad():
        embeddings = model(Batch.of(torch.zeros(2, 3, 48, 32)))
    assert embeddings.test.shape == (2, predictor.dimension)
    with pytest.raises(ConfigError, match="Predictor takes it"):
        reid.load_model("x.onnx")


def test_the_front_door_opens_late() -> None:
    code = (
        "import sys; import reid; assert 'torch' not in sys.modules; "
        "assert 'Predictor' in dir(reid); assert reid.__version__; "
        "assert reid.Predictor.__name__ == 'Predictor'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        reid.Predicter  # noqa: B018
    assert reid.evaluate_features.__module__ == "reid.evaluation.report"


def onnx_file(path: Path, predictor: Predictor, *, cameras: bool = True, card: bool = True) -> Path:
    """Mean colours and, if wanted, the camera's number, as a unit vector."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    make = helper.make_node
    nodes = [make("ReduceMean", ["images", "axes"], ["colour"], keepdims=0)]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 48, 32])]
    if cameras:
        inputs.append(helper.make_tensor_value_info("cameras", TensorProto.INT64, ["N"]))
        nodes += [
            make("Cast", ["cameras"], ["number"], to=TensorProto.FLOAT),
            make("Unsqueeze", ["number", "one"], ["column"]),
            make("Concat", ["colour", "column"], ["all"], axis=1),
        ]
    nodes.append(make("LpNormalization", ["all" if cameras else "colour"], ["features"], p=2))
    graph = helper.make_graph(
        nodes, "g", inputs,
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 3 + cameras])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
         helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if card:
        content = json.loads(predictor.card.to_json()) | {"dimension": 3 + cameras, "flip": False}
        helper.set_model_props(model, {METADATA_KEY: json.dumps(content)})
    onnx.save(model, path)
    return path


def test_an_onnx_file_is_a_model_too(predictor: Predictor, tmp_path: Path) -> None:
    model = Predictor(onnx_file(tmp_path / "m.onnx", predictor), batch_size=2)
    images = [pixels(seed, 48, 32) for seed in range(5)]
    features = model(images, [0, 1, 2, None, 0])
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.229, 0.224, 0.225])
    colour = np.stack([((image / 255 - mean) / std).mean((0, 1)) for image in images])
    expected = np.concatenate((colour, np.array([[0, 1, 2, -1, 0]]).T), 1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    plain = Predictor(onnx_file(tmp_path / "n.onnx", predictor, cameras=False))
    assert plain(images).shape == (5, 3)


def test_onnx_files_that_do_not_fit(predictor: Predictor, tmp_path: Path) -> None:
    bare = onnx_file(tmp_path / "m.onnx", predictor, card=False)
    with pytest.raises(WeightsError, match="no 'reid' in its metadata"):
        Predictor(bare)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(WeightsError, match=r"text\.onnx: cannot be run as an ONNX file"):
        Predictor(tmp_path / "text.onnx")
    whole = onnx_file(tmp_path / "w.onnx", predictor)
    for options in ({"precision": "fp16"}, {"weights": "x"}, {"overrides": ["A", "1"]}):
        with pytest.raises(ConfigError, match="is an ONNX file, which has its own"):
            Predictor(whole, **options)
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda"):
        Predictor(whole, device="tpu")


def test_onnx_files_that_do_not_give_what_they_say(predictor: Predictor, tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", predictor)
    import onnx
    from onnx import helper

    (tmp_path / "changed").mkdir()
    for change, message in (
        ({"dimension": 9}, r"m\.onnx: expected float32 features \(1, 9\) .*\(1, 4\)"),
        ({"size": [40, 32]}, r"m\.onnx: does not run with 1 images"),
    ):
        model = onnx.load(path)
        content = json.loads(model.metadata_props[0].value) | change
        del model.metadata_props[:]
        helper.set_model_props(model, {METADATA_KEY: json.dumps(content)})
        onnx.save(model, tmp_path / "changed" / "m.onnx")
        with pytest.raises(WeightsError, match=message):
            Predictor(tmp_path / "changed" / "m.onnx")(pixels(0))


def test_onnxruntime_is_an_extra(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = onnx_file(tmp_path / "m.onnx", predictor)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'reid\[export\]'"):
        Predictor(path)
