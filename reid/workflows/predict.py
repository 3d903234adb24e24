"""The front door of a trained model: pictures in, features out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from reid.assembly.model_card import ModelCard
from reid.checking import shortened
from reid.data.inputs import Picture, Pictures, each_picture, to_pixels
from reid.data.resize import Pixels
from reid.evaluation.thresholds import Thresholds
from reid.modeling.model import ReIDModel
from reid.registry import ConfigError
from reid.workflows.runtime import Network, OnnxNetwork, TorchNetwork
from reid.workflows.thresholds import load_thresholds
from reid.workflows.trained import TrainedModel, load_trained

Features: TypeAlias = npt.NDArray[np.float32]
Camera: TypeAlias = str | int | np.integer[Any] | tuple[str, str] | None
"""A camera's name or number as the model knows it, or (data set, name); None: any other."""
Cameras: TypeAlias = str | int | np.integer[Any] | Iterable[Camera] | None
"""One camera for all pictures, or one for each."""

_ONNX_BATCH = 64
_SHOWN = 5


class Predictor:
    """Features of pictures of persons, by a trained model.

    The features are those of `train_net.py --eval-only`: pictures are resized and normalised as
    in the training of the weights, and TEST.FLIP comes from the config. Several threads may call
    one predictor at the same time. It changes nothing outside itself.

    Args:
        model: Folder of a run, with its best (or else final) weights; a config file; a
            .safetensors file of a run; or an .onnx file of tools/export.py.
        weights: Checkpoint to use instead of the run's or the config's.
        batch_size: Pictures per call of the network; None: TEST.BATCH_SIZE, or 64 for an ONNX file.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; None: the config's.
        precision: `fp32`, `bf16` or `fp16`; None: TEST.PRECISION. An ONNX file has its own.
        overrides: KEY VALUE pairs that win over the config.

    Attributes:
        card: Size, statistics, cameras and origin of the model.
        weights: The file that was loaded.
        batch_size: As above.
        precision: As above; `onnx` for an ONNX file.
        trained: The model in torch, with its config; None: it is an ONNX file.
        network: Gives features of images that are resized and normalised already.

    Raises:
        ConfigError: There is no such model, or a setting is wrong.
        WeightsError: The weights are broken or do not fit.
    """

    def __init__(
        self,
        model: str | Path,
        weights: str | Path | None = None,
        *,
        batch_size: int | None = None,
        device: str | None = None,
        precision: str | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        self.network: Network
        self.trained: TrainedModel | None
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size: expected 1 or more, got {batch_size}")
        if Path(model).suffix == ".onnx":
            _refuse_for_onnx(model, weights, precision, overrides)
            self.weights = Path(model)
            self.network = OnnxNetwork(self.weights, device or "auto")
            self.batch_size = batch_size or _ONNX_BATCH
            self.precision = "onnx"
            self.trained = None
        else:
            trained = _load(model, weights, device, precision, overrides)
            test = trained.config.test
            self.weights = trained.weights
            self.network = TorchNetwork(trained, test.precision)
            self.batch_size = batch_size or test.batch_size
            self.precision = test.precision
            self.trained = trained
        self.card: ModelCard = self.network.card
        self._transform = self.card.transform()

    @cached_property
    def thresholds(self) -> Thresholds | None:
        """From which similarity two pictures count as the same person.

        None: tools/thresholds.py has left nothing about this model beside its weights.

        Raises:
            DataError: Their file is broken.
        """
        return load_thresholds(self.weights, self.fingerprint)

    @property
    def dimension(self) -> int:
        """D of the features."""
        return self.card.dimension

    @property
    def fingerprint(self) -> str:
        """The same for all models whose features can be compared; see `ModelCard`."""
        return self.card.fingerprint

    def __call__(self, images: Pictures, cameras: Cameras = None, *, bgr: bool = False) -> Features:
        """Features of pictures of one person each.

        Args:
            images: One picture, or any number, of any sizes and kinds, mixed as you like: paths,
                Pillow's Images, uint8 arrays (height, width, 3) in RGB or (height, width) in grey,
                tensors (3, height, width) of uint8 or of floats from 0 to 1. An array (N, height,
                width, 3) or a tensor (N, 3, height, width) is N pictures. They are read batch by
                batch, so a generator may give more pictures than fit into memory.
            cameras: A name or number for all, or one for each; see `ModelCard.camera_number`. None:
                unknown cameras, for which the model uses the mean of its learned cameras.
            bgr: Arrays and tensors have the blue channel first, as those of OpenCV.

        Returns:
            (N, D) unit vectors: the product of two is their similarity, from -1 to 1.

        Raises:
            DataError: A file cannot be read.
            ValueError: A picture or a camera is invalid; the message has its number, from 0.
            FloatingPointError: A feature is not finite.
        """
        pictures = enumerate(each_picture(images))
        pixels = (to_pixels(image, f"image {place}", bgr=bgr) for place, image in pictures)
        return self._features(pixels, cameras)

    def boxes(
        self,
        frame: Picture,
        boxes: npt.ArrayLike,
        cameras: Cameras = None,
        *,
        bgr: bool = False,
    ) -> Features:
        """Features of the persons in a frame, for a tracker.

        Args:
            frame: One picture, as for a call.
            boxes: (M, 4) left, top, right and bottom in pixels. Fractions are rounded outwards to
                whole pixels; boxes are clipped to the frame.
            cameras: As for a call; most often the frame's one camera.
            bgr: As for a call.

        Returns:
            (M, D) unit vectors.

        Raises:
            DataError: The file cannot be read.
            ValueError: Boxes are not (M, 4) finite numbers, or some have no pixel inside the
                frame; names these by number, from 0.
        """
        pixels = to_pixels(frame, "frame", bgr=bgr)
        corners = _corners(boxes, pixels.shape[0], pixels.shape[1])
        crops = (
            np.ascontiguousarray(pixels[top:bottom, left:right])
            for left, top, right, bottom in corners
        )
        return self._features(crops, cameras)

    def _features(self, pixels: Iterable[Pixels], cameras: Cameras) -> Features:
        numbers = self._camera_numbers(cameras)
        remaining, done = iter(pixels), 0
        blocks = [np.empty((0, self.dimension), np.float32)]
        while batch := list(islice(remaining, self.batch_size)):
            camids = list(islice(numbers, len(batch)))
            if len(camids) < len(batch):
                raise ValueError(
                    f"cameras: expected one for each picture, got {done + len(camids)}"
                )
            blocks.append(self._embed(batch, camids, done))
            done += len(batch)
        one_for_all = isinstance(cameras, (str, int, np.integer, type(None)))
        if not one_for_all and next(numbers, None) is not None:
            raise ValueError(f"cameras: expected {done}, one for each picture, got more")
        return np.concatenate(blocks)

    def _embed(self, batch: Sequence[Pixels], camids: Sequence[int], first: int) -> Features:
        """(B, D) of pictures of any sizes.

        Args:
            batch: The pictures.
            camids: Their cameras in the model.
            first: Number of the first picture, for messages.
        """
        images = np.empty((len(batch), 3, *self.card.size), np.float32)
        for image, pixels in zip(images, batch, strict=True):
            self._transform.normalize(self._transform.resize(pixels), image)
        features = self.network(torch.from_numpy(images), torch.tensor(camids)).numpy()
        wrong = np.flatnonzero(~np.isfinite(features).all(1))
        if len(wrong):
            raise FloatingPointError(
                f"image {first + int(wrong[0])}: its feature is not finite; the model's weights "
                "are broken, or values are too large for the precision"
            )
        return features

    def _camera_numbers(self, cameras: Cameras) -> Iterator[int]:
        """The cameras' numbers in the model; a single camera is repeated without end."""
        if isinstance(cameras, np.integer):
            cameras = int(cameras)
        if cameras is None or isinstance(cameras, (str, int)):
            number = self.card.camera_number(cameras)
            while True:
                yield number
        try:
            each = iter(cameras)
        except TypeError:
            raise ValueError(
                "cameras: expected a name or number for all pictures, or a list of one for each, "
                f"got {shortened(cameras)}"
            ) from None
        for place, camera in enumerate(each):
            try:
                yield self.card.camera_number(
                    int(camera) if isinstance(camera, np.integer) else camera
                )
            except ValueError as error:
                raise ValueError(f"image {place}: {error}") from None


def load_model(
    model: str | Path, weights: str | Path | None = None, *, device: str | None = None
) -> ReIDModel:
    """The network itself, in eval mode, for callers who need more than features.

    It takes a `reid.structures.Batch` of normalised images and gives `Embeddings`: banks of the
    whole image and of parts, before and after the neck.

    Args:
        model: As for `Predictor`, but no ONNX file.
        weights: As for `Predictor`.
        device: As for `Predictor`.

    Raises:
        ConfigError: There is no such model, or a setting is wrong.
        WeightsError: The weights are broken or do not fit.
    """
    if Path(model).suffix == ".onnx":
        raise ConfigError(f"{model}: an ONNX file has no torch network; Predictor takes it")
    return _load(model, weights, device, None, ()).model


def _load(
    model: str | Path,
    weights: str | Path | None,
    device: str | None,
    precision: str | None,
    overrides: Sequence[str],
) -> TrainedModel:
    pairs = [*overrides]
    for key, value in (("DEVICE", device), ("TEST.PRECISION", precision)):
        if value is not None:
            pairs += [key, value]
    return load_trained(Path(model), None if weights is None else Path(weights), pairs)


def _refuse_for_onnx(
    model: str | Path,
    weights: str | Path | None,
    precision: str | None,
    overrides: Sequence[str],
) -> None:
    """Refuses arguments that an ONNX file fixes itself.

    Raises:
        ConfigError: One of them is given.
    """
    for name, value in (("weights", weights), ("precision", precision), ("overrides", overrides)):
        if value:
            raise ConfigError(
                f"{name}: {model} is an ONNX file, which has its own; leave it out, got {value!r}"
            )


def _corners(boxes: npt.ArrayLike, height: int, width: int) -> npt.NDArray[np.int64]:
    """(M, 4) whole pixels inside a frame.

    Raises:
        ValueError: They are no boxes, or have no pixel in the frame.
    """
    numbers = np.asarray(boxes, np.float64)
    if not numbers.size:
        return np.empty((0, 4), np.int64)
    if numbers.ndim != 2 or numbers.shape[1] != 4:
        raise ValueError(
            f"boxes: expected (M, 4), left, top, right, bottom of each; got {numbers.shape}"
        )
    if not np.isfinite(numbers).all():
        wrong = np.flatnonzero(~np.isfinite(numbers).all(1))
        raise ValueError(f"boxes: not finite: {_listed(wrong, numbers)}")
    outwards = np.concatenate((np.floor(numbers[:, :2]), np.ceil(numbers[:, 2:])), 1)
    limits = np.array([width, height, width, height])
    corners: npt.NDArray[np.int64] = np.clip(outwards, 0, limits).astype(np.int64)
    empty = np.flatnonzero((corners[:, 2:] <= corners[:, :2]).any(1))
    if len(empty):
        raise ValueError(
            f"boxes: without a pixel in the frame of {width} x {height}: "
            f"{_listed(empty, numbers)}; expected left, top, right, bottom"
        )
    return corners


def _listed(which: npt.NDArray[np.int64], boxes: npt.NDArray[np.float64]) -> str:
    shown = ", ".join(f"{place} {boxes[place].tolist()}" for place in which[:_SHOWN])
    return shown + (f", ... ({len(which)} in all)" if len(which) > _SHOWN else "")
