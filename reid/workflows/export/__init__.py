"""Exports a trained model as one ONNX file and compares the two."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reid.assembly.hooks import build_evaluator
from reid.assembly.model_card import METADATA_KEY, ModelCard
from reid.assembly.provenance import config_hash, git_state
from reid.data.loaders import eval_loader
from reid.data.scan import scan_images
from reid.engine.testing import evaluate
from reid.files import file_sha256, replacing
from reid.registry import ConfigError
from reid.structures import DataError, ImageRecord
from reid.workflows.export.check import (
    BATCHES,
    BOUNDS,
    Agreement,
    ExportError,
    OnnxModel,
    WithoutCameras,
    compare,
    judge,
)
from reid.workflows.export.graph import (
    CAMERAS,
    IMAGES,
    OPSET,
    PACKAGES,
    CameraInput,
    trace,
)
from reid.workflows.export.precision import Feed, Precision, load_bytes, to_half, to_int8
from reid.workflows.extras import require_packages
from reid.workflows.pictures import pick_images
from reid.workflows.runtime import cameras_of
from reid.workflows.thresholds import load_thresholds, save_thresholds
from reid.workflows.trained import TrainedModel, load_trained

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ExportError", "Exported", "export_model"]

logger = logging.getLogger(__name__)

_MOST_CALIBRATION = 512
"""Images for int8; they are in memory at once."""


@dataclass(frozen=True)
class Exported:
    """The result of an export, and how far it is from the torch model.

    Attributes:
        path: The file.
        num_bytes: Its size.
        card: Its metadata.
        agreement: On images, in batches of `BATCHES`.
        scores: mAP from 0 to 1 by the name of the model; empty: not measured.
        quantization: How int8 was made, in words; empty for other precisions.
    """

    path: Path
    num_bytes: int
    card: ModelCard
    agreement: Agreement
    scores: dict[str, float] = field(default_factory=dict)
    quantization: str = ""

    def text(self) -> str:
        """The report of the tool."""
        lines = [self.quantization] if self.quantization else []
        lines.append(
            f"Against torch, batches of {', '.join(map(str, BATCHES))}: largest difference "
            f"{self.agreement.difference:.2g}, smallest cosine {self.agreement.cosine:.7f}"
        )
        lines += [f"mAP {100 * value:.2f} %  {name}" for name, value in self.scores.items()]
        if self.card.flip:
            lines.append(
                "TEST.FLIP is on, but the file does not do it: add the features of an image and of "
                "its mirror image, and make the sum a unit vector"
            )
        lines.append(f"Written to {self.path} ({self.num_bytes / 1e6:.1f} MB)")
        return "\n".join(lines)


def export_model(
    place: Path,
    output: Path,
    weights: Path | None = None,
    *,
    precision: Precision = "fp32",
    cameras: CameraInput = "input",
    images: Sequence[Path] = (),
    calibration: Sequence[Path] = (),
    measure: bool = False,
    overrides: Sequence[str] = (),
) -> Exported:
    """Writes a model as ONNX if onnxruntime gives the same features as torch.

    Args:
        place: Folder of a run, or a config file.
        output: The file; an existing one is replaced only if the new one is good.
        weights: Weights to use instead of the run's.
        precision: Of the network; inputs and outputs are always float32.
        cameras: See `trace`.
        images: Files or folders to compare on; none: queries of the first test set.
        calibration: Files or folders of images, for int8.
        measure: Whether to measure the mAP on the first test set before and after.
        overrides: KEY VALUE pairs that win over the config.

    Raises:
        ConfigError: A setting is wrong, a package is missing, or there is nothing to compare on.
        DataError: An image cannot be read.
        WeightsError: The weights do not fit.
        ExportError: The file is too far from the torch model; nothing is written.
        OutputError: The file cannot be written.
    """
    require_packages("the export", "export", PACKAGES)
    if calibration and precision != "int8":
        raise ConfigError(f"--calibration: works only for int8, but the precision is {precision}")
    trained = load_trained(place, weights, ["DEVICE", "cpu", *overrides])
    size = (trained.config.input.size[0], trained.config.input.size[1])
    sample = _sample(trained, images)
    logger.info("Tracing %s, opset %d", trained.name, OPSET)
    graph = trace(trained.model, size, cameras)
    told = ""
    if precision == "fp16":
        graph = to_half(graph)
    elif precision == "int8":
        graph, told = to_int8(graph, _calibration(trained, calibration, graph))
    file = OnnxModel(graph.SerializeToString())
    agreement = compare(file, trained.model, sample, cameras)
    bounds = BOUNDS[precision]
    judge(agreement, bounds, None)
    scores = _measure(trained, file, cameras) if measure else {}
    if scores:
        judge(agreement, bounds, scores["torch"] - scores["file"])
    card = _card(trained, graph, cameras, precision, told, agreement, scores)
    _describe(graph, card)
    with replacing(output) as temporary:
        temporary.write_bytes(graph.SerializeToString())
    _carry_thresholds(trained.weights, output, card.fingerprint)
    return Exported(output, graph.ByteSize(), card, agreement, scores, told)


def _sample(trained: TrainedModel, files: Sequence[Path]) -> Tensor:
    """Normalised images (N, 3, H, W) to compare on."""
    count = sum(BATCHES)
    records, dataset = pick_images(trained, count, _some(_listed(files), count))
    return trained.batch(records, dataset).image


def _listed(places: Sequence[Path]) -> list[Path]:
    """The files, and the images below the folders."""
    paths: list[Path] = []
    for place in places:
        if place.is_dir():
            below = [place / name for name in scan_images(place).images]
            if not below:
                raise DataError(f"{place}: has no image")
            paths += below
        else:
            paths.append(place)
    return paths


def _some(files: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the files, evenly chosen."""
    return [*files[:: -(-len(files) // count)]] if files else []


def _calibration(trained: TrainedModel, places: Sequence[Path], graph: ModelProto) -> Feed | None:
    """Inputs of the graph from the calibration images; None: there are none."""
    listed = _listed(places)
    if not listed:
        return None
    files = _some(listed, _MOST_CALIBRATION)
    if len(files) < len(listed):
        logger.info("Calibration takes %d of %s images, evenly", len(files), f"{len(listed):,}")
    loader = eval_loader(
        [ImageRecord(str(path)) for path in files], trained.transform(), batch_size=len(files)
    )
    image = next(iter(loader)).image
    feed = {IMAGES: image.numpy()}
    if CAMERAS in [put.name for put in graph.graph.input]:
        feed[CAMERAS] = (torch.arange(len(image)) % (trained.model.num_cameras + 1) - 1).numpy()
    return feed


def _measure(trained: TrainedModel, file: OnnxModel, cameras: CameraInput) -> dict[str, float]:
    """MAP of the torch model and of the file, and with cameras where the file has none."""
    test_set, evaluator = trained.test_set(), build_evaluator(trained.config)
    if evaluator.needs_raw:
        raise ConfigError(
            f"test.evaluator: {type(evaluator).__name__} compares features before normalisation, "
            "which an exported file does not give; set TEST.EVALUATOR.NORMALIZE true"
        )
    models: dict[str, nn.Module] = {"torch": trained.model, "file": file}
    if trained.model.num_cameras and cameras == "mean":
        models = {
            "torch": WithoutCameras(trained.model),
            "file": file,
            "torch, told the camera of each image": trained.model,
        }
    scores = {}
    for name, model in models.items():
        numbers = evaluate(model, test_set, evaluator, trained.device).numbers
        if "mAP" not in numbers:
            raise ConfigError(
                f"test.evaluator: {type(evaluator).__name__} gives no mAP, which --measure compares"
            )
        scores[name] = numbers["mAP"]
    return scores


def _card(
    trained: TrainedModel,
    graph: ModelProto,
    cameras: CameraInput,
    precision: Precision,
    quantization: str,
    agreement: Agreement,
    scores: dict[str, float],
) -> ModelCard:
    """The metadata of the file."""
    config, path = trained.config, trained.weights
    provenance: dict[str, Any] = {
        "weights_sha256": file_sha256(path),
        "weights": path.name,
        "config_hash": config_hash(config),
        "git": git_state(),
        "backbone": config.model.backbone,
        "head": config.model.head,
        "precision": precision,
        "quantization": quantization,
        "opset": OPSET,
        "cameras": cameras if trained.model.num_cameras else None,
        "against_torch": asdict(agreement),
        "mAP": scores,
        "libraries": {
            name: version(name) for name in ("reid", "torch", "onnx", "onnxscript", "onnxruntime")
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    asks = CAMERAS in [put.name for put in graph.graph.input]
    dimension = int(graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value)
    return ModelCard.of(
        config.input,
        cameras_of(trained) if asks else None,
        dimension,
        provenance,
        flip=config.test.flip,
    )


def _carry_thresholds(weights: Path, output: Path, fingerprint: str) -> None:
    """Leaves the model's thresholds beside the file too, which has the same features."""
    if output.with_suffix(weights.suffix).exists():
        return  # weights of that name have their own there
    thresholds = load_thresholds(weights, fingerprint)
    if thresholds is not None:
        save_thresholds(output, fingerprint, thresholds)


def _describe(graph: ModelProto, card: ModelCard) -> None:
    """Puts the card into the graph's metadata."""
    import onnx

    onnx.helper.set_model_props(graph, {METADATA_KEY: card.to_json()})
    onnx.checker.check_model(graph)
    load_bytes(graph.SerializeToString())
