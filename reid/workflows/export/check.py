"""Compares the features of an ONNX file with those of the torch model, on real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reid.modeling.model import ReIDModel
from reid.structures import Batch, Embeddings
from reid.workflows.export.graph import CAMERAS, IMAGES, CameraInput, TestNetwork
from reid.workflows.export.precision import Precision

BATCHES = (1, 2, 14)
"""The batch sizes of the comparison."""


class ExportError(RuntimeError):
    """An exported file differs too much from its model; the message says how much."""


@dataclass(frozen=True)
class Bounds:
    """How far a file may be from the torch model.

    Attributes:
        difference: Largest of a number in a unit vector.
        cosine: Smallest of a feature with the torch model's.
        mAP: Largest loss, as a fraction of 1.
    """

    difference: float
    cosine: float
    mAP: float  # noqa: N815 - the name in the literature


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(1e-4, 0.99999, 0.001),
    "fp16": Bounds(1e-2, 0.999, 0.005),
    "int8": Bounds(0.1, 0.97, 0.02),
}


@dataclass(frozen=True)
class Agreement:
    """What a comparison found.

    Attributes:
        difference: Largest of a number in a unit vector.
        cosine: Smallest of a feature with the torch model's.
    """

    difference: float
    cosine: float


class OnnxModel(nn.Module):
    """An ONNX file in place of a model, for evaluation; runs on the CPU.

    Args:
        data: The file's bytes.
        threads: Threads per matrix product; 0: all of the machine.
    """

    def __init__(self, data: bytes, threads: int = 0) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"]
        )
        self._with_cameras = CAMERAS in [put.name for put in self.session.get_inputs()]

    def run(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Features (N, D) of images (N, 3, H, W) and cameras (N,); None: unknown."""
        feed: dict[str, Any] = {IMAGES: images.cpu().numpy()}
        if self._with_cameras:
            unknown = torch.full((len(images),), -1)
            feed[CAMERAS] = (unknown if cameras is None else cameras).cpu().numpy()
        return torch.from_numpy(self.session.run(None, feed)[0]).to(images.device)

    def forward(self, batch: Batch) -> Embeddings:
        """The features as the one bank."""
        features = self.run(batch.image, batch.camid)
        bank = features[:, None]
        return Embeddings(bank, bank, bank, features)


class WithoutCameras(nn.Module):
    """A model that gets no camera for any image.

    Args:
        model: Batch -> Embeddings.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Embeddings:
        """Embeddings with the mean of the cameras."""
        embeddings: Embeddings = self.model(batch._replace(camid=torch.full_like(batch.camid, -1)))
        return embeddings


def compare(
    file: OnnxModel, model: ReIDModel, images: Tensor, cameras: CameraInput = "input"
) -> Agreement:
    """The largest difference on batches of `BATCHES` images.

    Cameras go through all that the model knows, and unknown ones.

    Args:
        file: Of the model.
        model: In eval mode, on the CPU.
        images: (N, 3, H, W); repeated from the start if there are too few.
        cameras: The `cameras` argument of the export.

    Raises:
        ExportError: The file gives other shapes, or numbers that are not finite, or does not run.
    """
    network = TestNetwork(model)
    rows = torch.arange(sum(BATCHES))
    numbers = (
        rows % (model.num_cameras + 2) - 1
        if model.num_cameras and cameras == "input"
        else torch.full_like(rows, -1)
    )
    largest, smallest = 0.0, 1.0
    first = 0
    for count in BATCHES:
        chosen = rows[first : first + count]
        first += count
        batch, camids = images[chosen % len(images)], numbers[chosen]
        with torch.inference_mode():
            expected = network(batch, camids).double().numpy()
        found = _run(file, batch, camids).double().numpy()
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise ExportError(
                f"for {len(batch)} images the file gives features {found.shape}, expected finite "
                f"features {expected.shape}"
            )
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosines = (found * expected).sum(1) / np.maximum(norms, 1e-12)
        largest = max(largest, float(np.abs(found - expected).max()))
        smallest = min(smallest, float(cosines.min()))
    return Agreement(largest, smallest)


def judge(agreement: Agreement, bounds: Bounds, loss: float | None) -> None:
    """Refuses a file that is too far from the torch model.

    Args:
        agreement: On images.
        bounds: Of the precision.
        loss: Of mAP, as a fraction of 1; None: not measured.

    Raises:
        ExportError: A bound is exceeded.
    """
    passed = []
    if not agreement.difference <= bounds.difference:
        passed.append(
            f"largest difference {agreement.difference:.2g} (at most {bounds.difference})"
        )
    if not agreement.cosine >= bounds.cosine:
        passed.append(f"smallest cosine {agreement.cosine:.6f} (at least {bounds.cosine})")
    if loss is not None and not loss <= bounds.mAP:
        passed.append(f"mAP falls by {100 * loss:.2f} points (at most {100 * bounds.mAP:g})")
    if passed:
        raise ExportError(
            f"the file is too far from the torch model: {'; '.join(passed)}. Nothing was written"
        )


def _run(file: OnnxModel, images: Tensor, cameras: Tensor) -> Tensor:
    try:
        return file.run(images, cameras)
    except Exception as error:  # onnxruntime's errors have no common base
        raise ExportError(
            f"onnxruntime does not run the file with {len(images)} images: {error}"
        ) from error
