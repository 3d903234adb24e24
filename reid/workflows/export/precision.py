"""Graphs in fp16 and int8, by onnxruntime's own converters."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reid.registry import ConfigError

if TYPE_CHECKING:
    from onnx import ModelProto

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "int8"]
Feed = Mapping[str, np.ndarray[Any, Any]]
"""Inputs of a graph by name."""

# Sums of squares and powers exceed the range of fp16.
_IN_FLOAT32 = ("ReduceL2", "ReduceSum", "ReduceSumSquare", "Pow")
_PRODUCTS = ("MatMul", "Gemm")
_CALIBRATION_BATCH = 8


def to_half(model: ModelProto) -> ModelProto:
    """The graph in fp16; inputs and outputs stay float32.

    Powers and the norm of the features are still computed in float32.
    """
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        # It warns about each value that fp16 rounds to 0; our comparison judges these.
        warnings.simplefilter("ignore")
        half: ModelProto = float16.convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *_IN_FLOAT32],
        )
    OnnxModel(half).topological_sort()  # the converter appends the casts of the inputs
    return half


def to_int8(model: ModelProto, calibration: Feed | None) -> tuple[ModelProto, str]:
    """The graph with products, and perhaps convolutions, in int8.

    Weights have 7 of the 8 bits: with all of them, processors without VNNI overflow.

    Args:
        model: In fp32.
        calibration: Images on which the ranges of activations are measured once (static). None:
            each run measures them (dynamic), and convolutions remain in fp32.

    Returns:
        The graph, and a text that says what was done and why.

    Raises:
        ConfigError: The network consists of convolutions, and there are no images.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    share = product_share(model)
    if calibration is None and share < 0.5:
        raise ConfigError(
            f"int8: only {100 * share:.0f} % of the weights are in matrix products, the others are "
            "in convolutions, which need images to measure activations on: give some of yours with "
            "--calibration"
        )
    common: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
        # Products of two activations, as in attention, stay in fp32.
        "extra_options": {"MatMulConstBOnly": True},
    }
    with tempfile.TemporaryDirectory() as folder, _silent():
        path = Path(folder) / "model.onnx"
        if calibration is None:
            quantize_dynamic(model, path, op_types_to_quantize=[*_PRODUCTS], **common)
            told = (
                f"int8 dynamic: weights of matrix products ({100 * share:.0f} % of all) are int8, "
                "each run measures the ranges of activations, convolutions remain in fp32. Chosen "
                "since no calibration images were given"
            )
        else:
            quantize_static(
                model,
                path,
                _reader(calibration),
                op_types_to_quantize=["Conv", *_PRODUCTS],
                activation_type=QuantType.QUInt8,
                **common,
            )
            count = len(next(iter(calibration.values())))
            told = (
                f"int8 static: convolutions and matrix products are int8, with ranges of "
                f"activations from {count} calibration images. Chosen since such images were given"
            )
        return load_bytes(path.read_bytes()), told


def load_bytes(data: bytes) -> ModelProto:
    """Parses a serialised graph."""
    import onnx

    model: ModelProto = onnx.load_model_from_string(data)
    return model


def product_share(model: ModelProto) -> float:
    """The share of the weights, from 0 to 1, in matrix products."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    products = {
        name for node in model.graph.node if node.op_type in _PRODUCTS for name in node.input
    }
    return sum(sizes.get(name, 0) for name in products) / max(sum(sizes.values()), 1)


def _reader(feed: Feed) -> Any:
    """The calibration images as onnxruntime asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            count = len(next(iter(feed.values())))
            self._batches: Iterator[Feed] = iter(
                {name: rows[start : start + _CALIBRATION_BATCH] for name, rows in feed.items()}
                for start in range(0, count, _CALIBRATION_BATCH)
            )

        def get_next(self) -> Feed | None:
            return next(self._batches, None)

    return Reader()


@contextmanager
def _silent() -> Iterator[None]:
    """Hides onnxruntime's advice about steps that torch's exporter has already done."""
    root = logging.getLogger()
    before = root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
