"""tools/export.py: from a trained model to one ONNX file that gives the same features."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import reid.projects.tmgf  # noqa: F401  (registers its parts)
from reid.assembly.model_card import METADATA_KEY, ModelCard
from reid.assembly.network import build_model
from reid.assembly.plugins import register_parts
from reid.config import dump_config, load_config
from reid.evaluation.thresholds import ThresholdRow, Thresholds
from reid.modeling.model import ReIDModel
from reid.modeling.weights import save_weights
from reid.registry import BACKBONE, HEAD, ConfigError, build
from reid.structures import Batch
from reid.workflows import export, extras
from reid.workflows.export import Exported, ExportError, export_model, graph
from reid.workflows.export.check import BOUNDS, Agreement, OnnxModel, compare, judge
from reid.workflows.export.precision import to_int8
from reid.workflows.measure_thresholds import thresholds_of_model
from reid.workflows.predict import Predictor
from reid.workflows.thresholds import save_thresholds
from reid.workflows.trained import load_trained

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "export.py")
SIZE = (48, 32)
CONFIG = """
DATASETS: {TRAIN: {NAME: SyntheticPersons, NUM_TRAIN: 6, NUM_TEST: 4, NUM_CAMERAS: 3,
                   NUM_DISTRACTORS: 2, HEIGHT: 32, WIDTH: 16, SEED: 3}}
PLUGINS: [tmgf]
INPUT: {SIZE: [48, 32], PIXEL_MEAN: [0.4, 0.5, 0.6]}
MODEL:
  BACKBONE: {NAME: IBNViT, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 3, STEM_CHANNELS: 8}
  HEAD: {NAME: TMGFHead}
TEST: {FLIP: true}
DEVICE: cpu
"""
CAMERAS = [["drawn", 0, "door", True], ["drawn", 1, "", True], ["drawn", 2, "", False]]
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as a run leaves it; its model has three cameras."""
    root = tmp_path_factory.mktemp("export")
    folder = root / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATASETS", str(root / "datasets"))
        torch.manual_seed(0)
        config = load_config(folder / "config.yaml")
        register_parts(config)
        (folder / "config.yaml").write_text(dump_config(config))
        model = build_model(config, SIZE, 3, [2])
        model.train()
        for _ in range(20):  # BatchNorm's statistics, without which features are far from a run's
            model(Batch.of(torch.randn(32, 3, *SIZE)))
        known = {"cameras": json.dumps(CAMERAS)}
        save_weights(folder / "model_final.safetensors", model.state_dict(), known)
        yield folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Exported:
    """The file of the run, with its mAP before and after."""
    return export_model(run, run.parent / "model.onnx", measure=True)


@pytest.fixture
def traced(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> onnx.ModelProto:
    """What stands in for torch's exporter, which takes seconds: the graph that it made before."""
    model = onnx.load(exported.path)
    del model.metadata_props[:]
    monkeypatch.setattr(export, "trace", lambda *_: copy.deepcopy(model))
    return model


def use_tool(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(TOOL, run_name="__main__")
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out + output.err


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def test_the_file_gives_torchs_features_for_any_number_of_images(
    run: Path, exported: Exported
) -> None:
    session = session_of(exported.path)
    inputs = {put.name: (put.type, put.shape) for put in session.get_inputs()}
    assert inputs["images"] == ("tensor(float)", ["N", 3, *SIZE])
    assert inputs["cameras"] == ("tensor(int64)", ["N"])
    assert [(put.name, put.shape) for put in session.get_outputs()] == [("features", ["N", 24])]
    model = load_trained(run).model
    for count in (1, 3, 8):
        images, cameras = torch.randn(count, 3, *SIZE), torch.arange(count) % 5 - 1
        with torch.inference_mode():
            expected = model(Batch.of(images, cameras)).test.numpy()
        feed = {"images": images.numpy(), "cameras": cameras.numpy()}
        found = session.run(None, feed)[0]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    other = {**feed, "cameras": np.zeros(count, np.int64)}
    assert np.abs(session.run(None, other)[0] - found).max() > 1e-3


def test_its_metadata_say_what_to_give_it_and_where_it_is_from(
    run: Path, exported: Exported
) -> None:
    text = session_of(exported.path).get_modelmeta().custom_metadata_map[METADATA_KEY]
    card = ModelCard.from_json(text, "model.onnx")
    assert (card.size, card.interpolation, card.dimension) == (SIZE, "bicubic", 24)
    assert card.mean == (0.4, 0.5, 0.6)
    assert card.cameras == [("drawn", "door"), ("drawn", "1"), None]
    assert card.flip
    weights = (run / "model_final.safetensors").read_bytes()
    assert card.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert card.provenance["precision"] == "fp32"
    assert card.provenance["head"] == {"name": "TMGFHead"}
    data = exported.path.read_bytes()
    assert str(run).encode() not in data
    assert str(ROOT).encode() not in data
    assert b"site-packages" not in data


def test_the_comparison_is_told(exported: Exported) -> None:
    assert exported.agreement.difference < 1e-5
    assert exported.scores["file"] == pytest.approx(exported.scores["torch"], abs=1e-6)
    assert 0 < exported.scores["file"] <= 1
    text = exported.text()
    assert "batches of 1, 2, 14: largest difference" in text
    assert "smallest cosine" in text
    assert "TEST.FLIP is on, but the file does not do it" in text


def test_a_wrong_graph_is_refused_and_nothing_written(
    run: Path,
    traced: onnx.ModelProto,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = copy.deepcopy(traced)
    largest = max(wrong.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(values[..., ::-1].copy(), largest.name))
    monkeypatch.setattr(export, "trace", lambda *_: wrong)
    code, text = use_tool(capsys, run, tmp_path / "wrong.onnx")
    assert code == 2
    assert "ExportError: the file is too far from the torch model: largest difference" in text
    assert "smallest cosine" in text
    assert [*tmp_path.iterdir()] == []


def test_a_graph_for_one_number_of_images_is_refused(
    run: Path, traced: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = copy.deepcopy(traced)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    monkeypatch.setattr(export, "trace", lambda *_: fixed)
    with pytest.raises(ExportError, match="does not run the file with 1 images"):
        export_model(run, tmp_path / "fixed.onnx")
    assert [*tmp_path.iterdir()] == []


def test_what_stood_there_stays_when_the_new_file_is_refused(
    run: Path, traced: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model.onnx"
    output.write_bytes(b"older")
    monkeypatch.setattr(export, "BOUNDS", {"fp32": replace(BOUNDS["fp32"], cosine=1.1)})
    with pytest.raises(ExportError, match="smallest cosine"):
        export_model(run, output)
    assert output.read_bytes() == b"older"


def test_an_mAP_that_falls_is_refused() -> None:  # noqa: N802
    judge(Agreement(0, 1), BOUNDS["fp16"], 0.004)
    with pytest.raises(ExportError, match=r"mAP falls by 0.60 points \(at most 0.5\)"):
        judge(Agreement(0, 1), BOUNDS["fp16"], 0.006)
    with pytest.raises(ExportError, match="largest difference nan"):
        judge(Agreement(float("nan"), 1), BOUNDS["fp16"], None)


@pytest.mark.usefixtures("traced")
def test_half_precision(run: Path, exported: Exported, tmp_path: Path) -> None:
    half = export_model(run, tmp_path / "half.onnx", precision="fp16")
    assert half.num_bytes < 0.8 * exported.num_bytes
    inputs = {put.name: put.type for put in session_of(half.path).get_inputs()}
    assert inputs == {"images": "tensor(float)", "cameras": "tensor(int64)"}
    kinds = {tensor.data_type for tensor in onnx.load(half.path).graph.initializer}
    assert TensorProto.FLOAT16 in kinds
    assert 0 < half.agreement.difference < 1e-2
    assert half.card.provenance["precision"] == "fp16"
    assert half.card.fingerprint == exported.card.fingerprint


@pytest.mark.usefixtures("traced")
def test_int8_without_images_is_dynamic(run: Path, tmp_path: Path) -> None:
    small = export_model(run, tmp_path / "small.onnx", precision="int8")
    assert small.text().startswith("int8 dynamic: weights of matrix products (")
    assert "MatMulInteger" in operators(small.path)
    assert small.card.provenance["quantization"] == small.quantization


@pytest.mark.usefixtures("traced")
def test_int8_with_images_is_static(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = sorted((run.parent / "datasets").rglob("bounding_box_train"))[0]
    output = tmp_path / "small.onnx"
    code, text = use_tool(
        capsys, run, output, "--precision", "int8", "--calibration", drawn, "--images", drawn
    )
    assert code == 0, text
    assert "int8 static: convolutions and matrix products are int8" in text
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= operators(output)


def test_int8_of_convolutions_needs_images() -> None:
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "weight")
    node = helper.make_node("Conv", ["images", "weight"], ["features"])
    put = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8])
    out = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 4, 6, 6])
    model = helper.make_model(helper.make_graph([node], "g", [put], [out], [weight]))
    with pytest.raises(ConfigError, match="only 0 % of the weights are in matrix products"):
        to_int8(model, None)


def test_settings_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--calibration: works only for int8, but"):
        export_model(run, tmp_path / "m.onnx", calibration=[tmp_path])


def test_a_missing_package_is_told_with_the_extra(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "onnxscript" else name)
    code, text = use_tool(capsys, run, tmp_path / "m.onnx")
    assert code == 2
    assert text.strip() == (
        "ConfigError: the export needs packages that are not installed (onnxscript): "
        "pip install 'reid[export]'"
    )


def test_a_broken_package_is_told_with_the_extra(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise ImportError("libonnx.so: cannot open shared object file\nmore")

    monkeypatch.setattr(extras, "import_module", broken)
    with pytest.raises(ConfigError) as caught:
        Predictor(exported.path)
    assert str(caught.value) == (
        f"running {exported.path} needs onnxruntime, which is installed but cannot be imported "
        "(ImportError: libonnx.so: cannot open shared object file); install it anew: pip install "
        "--force-reinstall 'reid[export]'"
    )


def test_weights_that_no_file_holds_are_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="an ONNX file holds 2 GB at most"):
        export_model(run, tmp_path / "m.onnx")


@pytest.mark.usefixtures("traced")
def test_an_output_that_cannot_be_written_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in_the_way").write_text("a file where a folder should be")
    code, text = use_tool(capsys, run, tmp_path / "in_the_way" / "m.onnx")
    assert code == 2
    assert "OutputError: " in text


def test_the_lines_in_the_docs_run(
    run: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line and "import " not in line]
    assert len(lines) == 10
    drawn = sorted((run.parent / "datasets").rglob("*.jpg"))[:2]
    for name, path in zip(("a.jpg", "b.jpg"), drawn, strict=True):
        (tmp_path / name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").write_bytes(exported.path.read_bytes())
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(code[1], "docs/export.md", "exec"), scope)
    expected = features_of_files(run, drawn)
    np.testing.assert_allclose(scope["features"], expected, atol=1e-5)


def features_of_files(run: Path, paths: list[Path]) -> Any:
    from reid.structures import ImageRecord

    trained = load_trained(run)
    batch = trained.batch([ImageRecord(str(path)) for path in paths])
    with torch.inference_mode():
        return trained.model(batch).test.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["BNNeckHead", "TMGFHead"])
@pytest.mark.parametrize(
    ("backbone", "cameras"),
    [
        ({"name": "TimmBackbone", "model": "test_resnet"}, 0),
        ({"name": "TimmBackbone", "model": "resnet18", "pool": "gem", "last_stride": 1,
          "norm": "ibn", "stem_activation": False}, 0),
        ({"name": "TimmBackbone", "model": "resnet18", "pool": "max"}, 0),
        ({"name": "TimmBackbone", "model": "test_vit"}, 0),
        ({"name": "ViT", **VIT}, 0),
        ({"name": "ViT", "camera_embedding": True, **VIT}, 4),
        ({"name": "IBNViT", "stem_channels": 8, **VIT}, 4),
        *(({"name": "OSNet", "width": 0.25, "norm": norm}, 0) for norm in ("batch", "ibn", "ain")),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_every_backbone_with_every_head(
    backbone: Mapping[str, Any], cameras: int, head: str
) -> None:
    if head == "TMGFHead" and "ViT" not in backbone["name"]:
        pytest.skip("TMGFHead takes a ViT of ours")
    torch.manual_seed(0)
    net = build(
        BACKBONE, dict(backbone), "backbone", image_size=(64, 32), num_cameras=cameras,
        unseen_cameras=[1] if cameras else [],
    )  # fmt: skip
    model = ReIDModel(net, build(HEAD, {"name": head}, "head", backbone=net)).eval()
    images = torch.randn(17, 3, 64, 32)
    for how in ("input", "mean") if cameras else ("input",):
        file = OnnxModel(graph.trace(model, (64, 32), how).SerializeToString())
        agreement = compare(file, model, images, how)
        judge(agreement, BOUNDS["fp32"], None)
        names = [put.name for put in file.session.get_inputs()]
        assert names == ["images", "cameras"][: 2 if cameras and how == "input" else 1]


@pytest.mark.slow
def test_the_mean_of_the_cameras_as_a_tracker_takes_it(run: Path, tmp_path: Path) -> None:
    mean = export_model(run, tmp_path / "mean.onnx", cameras="mean", measure=True)
    assert [*mean.scores] == ["torch", "file", "torch, told the camera of each image"]
    assert mean.card.cameras is None
    session = session_of(mean.path)
    (put,) = session.get_inputs()
    crops = torch.randn(3, 3, *SIZE)
    features = session.run([session.get_outputs()[0].name], {put.name: crops.numpy()})[0]
    with torch.inference_mode():
        expected = load_trained(run).model(Batch.of(crops)).test.numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_predictor_of_the_file_gives_what_one_of_the_run_gives(
    run: Path, exported: Exported
) -> None:
    ours, file = Predictor(run), Predictor(exported.path)
    images = [*np.random.default_rng(1).integers(0, 256, (2, 40, 20, 3), np.uint8)]
    for cameras in (None, 1, [0, None], np.int64(1)):
        np.testing.assert_allclose(file(images, cameras), ours(images, cameras), atol=1e-5)
    assert file.fingerprint == ours.fingerprint
    assert file.card.cameras == ours.card.cameras


def test_thresholds_of_the_run_go_with_the_file(
    run: Path, traced: onnx.ModelProto, tmp_path: Path
) -> None:
    table = Thresholds("pairs", "shop", 3, 4, [ThresholdRow(0.5, 100.0, 0.9)])
    beside = save_thresholds(run / "model_final.safetensors", Predictor(run).fingerprint, table)
    try:
        export_model(run, tmp_path / "m.onnx")
        assert Predictor(tmp_path / "m.onnx").thresholds == table
        (tmp_path / "other.safetensors").touch()
        export_model(run, tmp_path / "other.onnx")
        assert not (tmp_path / "other.thresholds.json").exists()
    finally:
        beside.unlink()


def test_thresholds_measured_after_the_export_are_copied(
    run: Path,
    exported: Exported,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(exported.path.read_bytes())
    monkeypatch.setattr(sys, "argv", ["thresholds", "--model", str(file), "--copy", str(run)])
    main = runpy.run_path(str(ROOT / "tools" / "thresholds.py"))["main"]
    assert main() == 2
    assert "has no thresholds yet; measure them with --model" in capsys.readouterr().err
    table = Thresholds("pairs", "shop", 3, 4, [ThresholdRow(0.5, 100.0, 0.9)])
    beside = save_thresholds(run / "model_final.safetensors", Predictor(run).fingerprint, table)
    try:
        assert main() == 0
        assert Predictor(file).thresholds == table
        other = Predictor(run, overrides=["TEST.FLIP", "false"])
        with pytest.raises(ConfigError, match="is another model than"):
            thresholds_of_model(other, run)
    finally:
        beside.unlink()


def test_cameras_without_names_are_an_input_too(
    run: Path, traced: onnx.ModelProto, tmp_path: Path
) -> None:
    weights = tmp_path / "bare.safetensors"
    save_weights(weights, load_trained(run).model.state_dict(), {})
    export_model(run, tmp_path / "m.onnx", weights)
    file, ours = Predictor(tmp_path / "m.onnx"), Predictor(run, weights)
    assert file.card.cameras == ours.card.cameras == [("", "0"), ("", "1"), ("", "2")]
    assert file.fingerprint == ours.fingerprint
