"""Computes features of normalised images, with the network in torch or with an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reid.assembly.cameras import Camera, read_cameras
from reid.assembly.model_card import METADATA_KEY, ModelCard
from reid.evaluation.extract import Precision, embed_batch
from reid.files import InputError, file_sha256, open_regular
from reid.modeling.model import ReIDModel
from reid.modeling.weights import WeightsError, read_metadata
from reid.registry import ConfigError
from reid.shipped import tool
from reid.structures import Batch
from reid.workflows.extras import require_packages
from reid.workflows.trained import TrainedModel

IMAGES, CAMERAS, FEATURES = "images", "cameras", "features"
"""Names of the inputs and of the output in an ONNX file."""

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Network(Protocol):
    """Gives features; safe in threads."""

    card: ModelCard

    def __call__(self, images: Tensor, camids: Tensor) -> Tensor:
        """(B, D) unit vectors on the CPU, in float32.

        Args:
            images: (B, 3, H, W), normalised.
            camids: (B,) int64, numbers in the model; -1: unknown.
        """


class TorchNetwork:
    """A trained model in torch.

    Args:
        trained: The model; it stays in eval mode.
        precision: See `extract_features`.

    Attributes:
        card: Of the model.
    """

    def __init__(self, trained: TrainedModel, precision: Precision = "fp32") -> None:
        self._model, self._device, self._precision = trained.model, trained.device, precision
        self.card = card_of(trained)

    def __call__(self, images: Tensor, camids: Tensor) -> Tensor:
        """See `Network`."""
        batch = Batch.of(images, camids).to(self._device)
        return embed_batch(self._model, batch, self._precision, flip=self.card.flip).cpu()


class OnnxNetwork:
    """A model in an ONNX file whose metadata describe its input.

    Args:
        path: The file.
        device: `auto` (CUDA where this onnxruntime has it and there is a GPU), `cpu` or `cuda`.

    Attributes:
        card: Of the model, from the file's metadata.

    Raises:
        ConfigError: onnxruntime is missing, or has no CUDA where that was asked for.
        WeightsError: The file is missing or broken, or was not exported here.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        try:
            with open_regular(path):
                pass
        except InputError as error:
            raise WeightsError(f"{error}; expected an ONNX file") from error
        self._path = path
        self._session = _open_session(path, device)
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise WeightsError(
                f"{path}: has no {METADATA_KEY!r} in its metadata, so its preprocessing is "
                f"unknown; export it with {tool('export')}"
            )
        self.card = ModelCard.from_json(metadata[METADATA_KEY], str(path))
        self._inputs = {value.name for value in self._session.get_inputs()}
        if IMAGES not in self._inputs or not self._inputs <= {IMAGES, CAMERAS}:
            raise WeightsError(
                f"{path}: expected the inputs {IMAGES} and, if any, {CAMERAS}; got "
                f"{', '.join(sorted(self._inputs))}"
            )

    def __call__(self, images: Tensor, camids: Tensor) -> Tensor:
        """See `Network`."""
        features = self._run(images, camids)
        if self.card.flip:
            features = F.normalize(features + self._run(images.flip(3), camids), dim=-1)
        return features

    def _run(self, images: Tensor, camids: Tensor) -> Tensor:
        given = {IMAGES: images.contiguous().numpy(), CAMERAS: camids.numpy()}
        feed = {name: given[name] for name in sorted(self._inputs)}
        try:
            (features,) = self._session.run([FEATURES], feed)
        except Exception as error:  # onnxruntime's errors have no common base
            raise WeightsError(
                f"{self._path}: does not run with {len(images)} images ({_reason(error)}); export "
                "the model anew"
            ) from error
        expected = len(images), self.card.dimension
        if getattr(features, "shape", None) != expected or features.dtype != np.float32:
            got = f"{getattr(features, 'dtype', '')} {getattr(features, 'shape', 'no array')}"
            raise WeightsError(
                f"{self._path}: expected float32 features {expected} as its metadata say, got "
                f"{got}; export the model anew"
            )
        return F.normalize(torch.from_numpy(features), dim=-1)


def card_of(trained: TrainedModel) -> ModelCard:
    """The card of a model in torch.

    Raises:
        WeightsError: The list of cameras in the weights is broken.
    """
    config, model = trained.config, trained.model
    weights = trained.weights
    return ModelCard.of(
        config.input,
        cameras_of(trained),
        _dimension(model, config.input.size, trained.device),
        {
            "weights": weights.name,
            "weights_sha256": file_sha256(weights),
            "backbone": config.model.backbone,
            "head": config.model.head,
        },
        flip=config.test.flip,
    )


def cameras_of(trained: TrainedModel) -> Sequence[Camera] | None:
    """The cameras by their number in the model; None: it has none.

    If the weights do not name the cameras' data set, only their numbers are known.

    Raises:
        WeightsError: The cameras in the weights' metadata are wrong.
    """
    if not trained.model.num_cameras:
        return None
    known = read_cameras(read_metadata(trained.weights), str(trained.weights))
    return known or [Camera("", number) for number in range(trained.model.num_cameras)]


def _dimension(model: ReIDModel, size: tuple[int, int], device: torch.device) -> int:
    """D of the features, measured with a black image, since they may join those of parts."""
    black = torch.zeros(1, 3, *size, device=device)
    return embed_batch(model, Batch.of(black)).shape[1]


def _open_session(path: Path, device: str) -> Any:
    """An onnxruntime session.

    Raises:
        ConfigError: onnxruntime is missing, or has no CUDA where that was asked for.
        WeightsError: The file is no ONNX file that can be run.
    """
    require_packages(f"running {path}", "export", ["onnxruntime"])
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda for an ONNX file, got {device!r}")
    if device == "cuda" and _CUDA not in there:
        raise ConfigError(
            "device: got 'cuda', but this onnxruntime has no CUDA; "
            "pip install onnxruntime-gpu in its place"
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone: they are raised
    providers = [name for name in (_CUDA, _CPU) if name in there and (on_gpu or name == _CPU)]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise WeightsError(f"{path}: cannot be run as an ONNX file ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The first line of an error's text."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
