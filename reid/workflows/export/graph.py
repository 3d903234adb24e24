"""A network as an ONNX graph, by torch's exporter."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from reid.modeling.model import ReIDModel
from reid.registry import ConfigError
from reid.structures import Batch

if TYPE_CHECKING:
    from onnx import ModelProto

CameraInput = Literal["input", "mean"]
OPSET = 18
"""The operator set that torch's exporter writes without a later conversion."""
IMAGES, CAMERAS, FEATURES = "images", "cameras", "features"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MOST_BYTES = 2**31 - 2**24
"""Limit of a graph's weights: protobuf holds 2 GiB, and the operators need some room."""
_STEPS = ("torch.onnx", "onnxscript", "onnx_ir")


class TestNetwork(nn.Module):
    """A model as tests see it: images in, unit vectors out.

    Args:
        model: In eval mode.
    """

    __test__ = False  # pytest would take it for a test

    def __init__(self, model: ReIDModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Test features (N, D) of normalised images (N, 3, H, W) and cameras (N,)."""
        embeddings = self.model(Batch.of(images, cameras))
        test: Tensor = embeddings.test
        return test


def trace(model: ReIDModel, size: tuple[int, int], cameras: CameraInput) -> ModelProto:
    """The graph of a model in fp32, for any number of images; see `TestNetwork`.

    Args:
        model: Stays as it is.
        size: (H, W) of the images.
        cameras: `input`: a second input gives the camera of each image. `mean`: each image gets
            the mean of the learned cameras. A model without cameras never has a second input.

    Raises:
        ConfigError: The weights are more than a file holds, or the network needs more than images.
        RuntimeError: torch cannot export the network.
    """
    weights = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    if weights > _MOST_BYTES:
        raise ConfigError(
            f"the weights take {weights / 1e9:.1f} GB, but an ONNX file holds 2 GB at most; export "
            "a smaller network"
        )
    network = TestNetwork(copy.deepcopy(model).cpu().float().eval()).eval()
    example: tuple[Tensor, ...] = (torch.zeros(2, 3, *size),)
    names = [IMAGES]
    if model.num_cameras and cameras == "input":
        example += (torch.zeros(2, dtype=torch.int64),)
        names.append(CAMERAS)
    count = torch.export.Dim("N")
    with warnings.catch_warnings(), _quiet(), torch.no_grad():
        # The exporter warns about names of axes and about future changes in torch.
        warnings.simplefilter("ignore")
        network(*example)  # an error of its own, which the exporter would bury in others
        program: Any = torch.onnx.export(
            network,
            example,
            input_names=names,
            output_names=[FEATURES],
            dynamic_shapes=tuple({0: count} for _ in names),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    graph: ModelProto = program.model_proto
    _forget_origin(graph)
    return graph


def _forget_origin(model: ModelProto) -> None:
    """Removes the code locations of the operators: they contain paths of this machine."""
    graph = model.graph
    graph.doc_string = ""
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    del graph.value_info[:]
    del model.metadata_props[:]
    model.doc_string = ""


class _quiet:  # noqa: N801 - reads as a statement
    """Only errors of the exporter's own logs are shown."""

    def __enter__(self) -> None:
        self._levels = {name: logging.getLogger(name).level for name in _STEPS}
        for name in _STEPS:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
