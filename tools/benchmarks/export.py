#!/usr/bin/env python
"""Times a network in onnxruntime against torch on the CPU, one thread each, in turns.

CPU time is measured, which other work on the machine changes little. Weights and images are
random. fp32 is the graph of tools/export.py, int8 its dynamic quantisation, for networks of matrix
products.

Floor: the network's FLOPs at the speed of large fp32 matrix products; int8 may be below it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from floors import Floor, product_speed, same_threads
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

import reid.projects.tmgf  # noqa: F401  (registers its parts)
from reid.modeling.model import ReIDModel
from reid.registry import BACKBONE, HEAD, build
from reid.workflows.export.check import OnnxModel
from reid.workflows.export.graph import TestNetwork, trace
from reid.workflows.export.precision import product_share, to_half, to_int8

MODELS: dict[str, tuple[tuple[int, int], dict[str, Any], str]] = {
    "OSNet x1.0, 256x128": ((256, 128), {"name": "OSNet"}, "BNNeckHead"),
    "ResNet-50, 256x128": (
        (256, 128), {"name": "TimmBackbone", "model": "resnet50", "last_stride": 1}, "BNNeckHead",
    ),
    "TMGF ViT-S/16, 384x128": ((384, 128), {"name": "IBNViT"}, "TMGFHead"),
}  # fmt: skip


PRODUCT = 1024  # rows and columns of the product whose speed is the floor's


def main() -> int:
    """Prints a table of milliseconds per crop; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 14])
    parser.add_argument("--rounds", type=int, default=9, help="of which the median is taken")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    same_threads()
    rows, facts = [], []
    for name in arguments.models:
        size, backbone, head = MODELS[name]
        sides = _sides(size, backbone, head)
        for count in arguments.batches:
            images = torch.randn(count, 3, *size)
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                sides["torch"](images)
            times, speed = _times(sides, images, arguments.rounds)
            least = 1000 * counter.get_total_flops() / speed / count
            over = {
                side: Floor({"products": least}, value).facts()["over_floor"]
                for side, value in times.items()
            }
            rows.append({"network": name, "batch": count, **times, "floor": least})
            facts.append({**rows[-1], "over_floor": over})
            print(facts[-1], flush=True)
    print("Milliseconds of CPU time per crop, one thread, median")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))
    print(json.dumps({"stage": "export", "networks": facts}))
    return 0


def _sides(
    size: tuple[int, int], backbone: dict[str, Any], head: str
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Torch and onnxruntime, each a function of images."""
    torch.manual_seed(0)
    net = build(BACKBONE, dict(backbone), "backbone", image_size=size, num_cameras=6)
    model = ReIDModel(net, build(HEAD, {"name": head}, "head", backbone=net)).eval()
    graph = trace(model, size, "mean")
    network = TestNetwork(model)
    sides = {"torch": network.__call__, "onnx fp32": _file(graph)}
    if product_share(graph) >= 0.5:
        sides["onnx int8"] = _file(to_int8(graph, None)[0])
    sides["onnx fp16"] = _file(to_half(graph))
    return sides


def _file(graph: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return OnnxModel(graph.SerializeToString(), threads=1).run


def _times(
    sides: dict[str, Callable[[torch.Tensor], torch.Tensor]], images: torch.Tensor, rounds: int
) -> tuple[dict[str, float], float]:
    """Median milliseconds per crop of each side, and FLOP/s of products; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    speeds: list[float] = []
    with torch.inference_mode():
        for run in sides.values():
            run(images)
        for _ in range(rounds):
            for name, run in sides.items():
                start = time.process_time()
                run(images)
                times[name].append(time.process_time() - start)
            speeds.append(product_speed(PRODUCT, PRODUCT, PRODUCT))
    typical = {name: 1000 * statistics.median(each) / len(images) for name, each in times.items()}
    return typical, statistics.median(speeds)


if __name__ == "__main__":
    sys.exit(main())
